"""Stopping a run between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ECHO_SECONDS = 1.0
"""In which a second Ctrl-C is the first one, passed on by a launcher as well."""


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C, or a scheduler's SIGTERM or SIGUSR1, sets; a second Ctrl-C acts at once.

    Schedulers and launchers repeat their signals; that changes nothing.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    previous = {number: signal.getsignal(number) for number in numbers}
    asked_at = 0.0

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        now = time.monotonic()
        if event.is_set() and number == signal.SIGINT and now - asked_at > _ECHO_SECONDS:
            raise KeyboardInterrupt
        asked_at = asked_at if event.is_set() else now
        event.set()

    for number in previous:
        signal.signal(number, request)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
