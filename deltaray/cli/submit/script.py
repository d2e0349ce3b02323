"""What the files in `jobs/` run: one verb each, as the driver of a Ray job."""

import sys
from typing import NoReturn

from deltaray.cli import main


def run_script(verb: str) -> NoReturn:
    """The verb with the script's arguments and the command line's exit codes."""
    sys.path.pop(0)  # the scripts' folder, also in Ray's workers: `evaluate` there would hide the library of that name
    main([verb, *sys.argv[1:]])
