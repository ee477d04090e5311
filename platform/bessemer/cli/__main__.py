"""`python -m bessemer.cli`: the command line where the package was sent without its `bessemer` script."""

from bessemer.cli import main

main()
