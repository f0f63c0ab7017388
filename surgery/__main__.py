"""`python -m surgery`: the command line."""

from .cli import main

main()
