"""The command line, on top of everything else: `surgery`, and `python -m surgery`."""

import sys
from io import TextIOWrapper

MISSING = 'surgery: the command line needs typer: pip install "dropconnect-surgery[cli]"'


def main() -> None:
    """Run the command that `sys.argv` says.

    Exits with 0 if it is done, with 2 if it was used in a wrong way or something is not installed, and
    with 3 if a file was refused.
    """
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print(MISSING, file=sys.stderr)
        sys.exit(2)
    for stream in (sys.stdout, sys.stderr):  # the name of a file may be no text
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
