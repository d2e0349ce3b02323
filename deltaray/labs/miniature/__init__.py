"""A toy family of language models on which delta learning can be watched within minutes, without a GPU.

The models add three-digit numbers.  They learnt it from writers who forget carries, so they err as models
trained on real corpora do: systematically, all in the same direction, the smaller ones more strongly.
"""

from deltaray.labs.miniature.family import LADDER, STUDENT, ModelSpec
from deltaray.labs.miniature.fit import train_model
from deltaray.labs.miniature.make import make_family

__all__ = ["LADDER", "STUDENT", "ModelSpec", "make_family", "train_model"]
