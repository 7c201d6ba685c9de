"""A Ctrl-C is not lost."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AGAIN_AFTER = 0.05
"""Seconds; a finalizer is over by then."""


def _interrupt() -> None:
    if os.name == "nt":  # where os.kill would end the process
        signal.raise_signal(signal.SIGINT)
    else:
        os.kill(os.getpid(), signal.SIGINT)  # which also wakes what waits


@contextmanager
def heard() -> Iterator[None]:
    """Sends SIGINT once more, a moment later, if its KeyboardInterrupt was raised where Python ignores exceptions.

    That is in finalizers, which a Ctrl-C meets more often than their length suggests: one that comes while garbage is
    collected is raised in the first `__del__` (Lightning's profilers have one), and the program would just go on.
    """
    before = sys.unraisablehook

    def tell(ignored: Any) -> None:
        if ignored.exc_type is KeyboardInterrupt:
            again = threading.Timer(AGAIN_AFTER, _interrupt)
            again.daemon = True
            again.start()
        else:
            before(ignored)

    sys.unraisablehook = tell
    try:
        yield
    finally:
        sys.unraisablehook = before
