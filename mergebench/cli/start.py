"""Where the command begins, with as little imported as possible: an interrupt may come early."""

import sys


def main() -> None:
    """Run the command line, also if it is interrupted while it is being loaded."""
    try:
        from mergebench.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; nothing was written\n")
        sys.exit(130)
    run()
