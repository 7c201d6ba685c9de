"""A Ctrl-C is not lost, nor another signal that raises."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AGAIN_AFTER = 0.05
"""Seconds; a finalizer is over by then."""


def _send(number: int) -> None:
    if os.name == "nt":  # where os.kill would end the process
        signal.raise_signal(number)
    else:
        os.kill(os.getpid(), number)  # which also wakes what waits


@contextmanager
def heard() -> Iterator[None]:
    """Sends a signal once more, a moment later, if what its handler raised was raised where Python ignores exceptions.

    It is SIGINT's KeyboardInterrupt, or an exception that says in `by` which signal it was. Python ignores exceptions
    in finalizers, which a Ctrl-C meets more often than their length suggests: one that comes while garbage is
    collected is raised in the first `__del__` (Lightning's profilers have one), and the program would just go on.
    """
    before = sys.unraisablehook

    def tell(ignored: Any) -> None:
        interrupt = ignored.exc_type is KeyboardInterrupt
        number = signal.SIGINT if interrupt else getattr(ignored.exc_value, "by", None)
        if isinstance(number, int):
            again = threading.Timer(AGAIN_AFTER, _send, [number])
            again.daemon = True
            again.start()
        else:
            before(ignored)

    sys.unraisablehook = tell
    try:
        yield
    finally:
        sys.unraisablehook = before
