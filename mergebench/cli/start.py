"""Where the command begins, with as little imported as possible: an interrupt may come early."""

import atexit
import gc
import os
import signal
import sys
from typing import Any

_LINE = "error: interrupted; nothing was written\n"
#: OpenBLAS makes threads when numpy is imported, which look for work on every core for a tenth of a
#: second before they sleep, unless this says how long: 2^12 ticks of the clock, or microseconds.
_SPINNING = "OPENBLAS_THREAD_TIMEOUT", "12"
#: Objects made between two collections of garbage: imports, which go on until the work begins, make
#: many and leave none behind, and tiles are freed as soon as nothing refers to them.
_OBJECTS = 100_000


def main() -> None:
    """Run the command line, also if it is interrupted while it is being loaded."""
    # An interrupt that is ignored, as for jobs in the background, stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    os.environ.setdefault(*_SPINNING)
    gc.set_threshold(_OBJECTS)
    # Python looks twice for garbage among all objects while it ends, just before all of them go.
    atexit.register(gc.freeze)
    try:
        from mergebench.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write(_LINE)
        sys.exit(130)
    run()


def _interrupt(number: int, frame: Any) -> None:
    # numpy's own code takes an interrupt while it is imported for a broken installation, and prints
    # it. That is before any work.
    while frame is not None:
        importing = frame.f_locals.get("name") if frame.f_code.co_name == "_find_and_load" else None
        if str(importing).partition(".")[0] == "numpy":
            os.write(2, _LINE.encode())
            os._exit(130)
        frame = frame.f_back
    signal.default_int_handler(number, None)
