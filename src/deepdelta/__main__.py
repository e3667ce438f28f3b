"""`python -m deepdelta` is the command `deepdelta`."""

from deepdelta.cli import main

main()
