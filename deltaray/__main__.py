"""`python -m deltaray`."""

from deltaray.cli import main

main()
