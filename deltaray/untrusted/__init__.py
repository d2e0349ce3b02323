"""What others wrote and we have to compute (chat templates, regular expressions, checkers), with limits on time, memory
and output: in a process beside this one, which the kernel ends when it goes too far."""

from deltaray.untrusted.process import Limited, OverLimitError, RaisedError, limited

__all__ = ["Limited", "OverLimitError", "RaisedError", "limited"]
