"""The program ``fedunlearn``, apart from the package: Ctrl-C is heeded while the package, with torch, is imported."""

import sys


def main() -> None:
    """Run the command line; an interrupted start is told in one line, exit code 130."""
    try:
        from fedunlearn.cli import main as command_line
    except KeyboardInterrupt:
        print("fedunlearn: interrupted while it started: nothing was done", file=sys.stderr)
        sys.exit(130)
    command_line()
