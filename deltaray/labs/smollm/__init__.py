"""A real language model for a second demo: SmolLM2-135M-Instruct, its weaker selves, and a task that can be checked.

The model (Apache 2.0) comes from the Python index, where a wheel holds it as a GGUF file; no model hub is asked. A
weaker self is the same model with layers left out.
"""

from deltaray.labs.smollm.make import ladder_is_made, make_ladder
from deltaray.labs.smollm.weaken import LADDER

__all__ = ["LADDER", "ladder_is_made", "make_ladder"]
