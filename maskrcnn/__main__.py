"""`python -m maskrcnn` is the command `maskrcnn`."""

from maskrcnn.cli import main

main()
