"""A line on stderr that shows how long something has been going on."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def elapsed(does: str, every: float = 1.0) -> Iterator[None]:
    """Shows `does` and the seconds since it began, while the body runs.

    In a terminal the line is rewritten and goes away at the end; elsewhere it is
    printed once. A body that takes less than `every` shows nothing.

    Args:
        does: what is going on.
        every: seconds between two updates.
    """
    terminal, done = sys.stderr.isatty(), threading.Event()

    def show() -> None:
        start = time.perf_counter()
        while not done.wait(every):
            if not terminal:
                print(f"{does} ...", file=sys.stderr, flush=True)
                return
            seconds = time.perf_counter() - start
            print(f"\r{does}: {seconds:.0f} s ", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
