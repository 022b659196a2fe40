"""Find out which process of a run is missing where others wait for it, and end instead of waiting forever.

Every process counts how often it has begun to wait for the others, as all do in the same places, and writes
the count, twice a second, into the store of the launcher. Whoever waits too long reads all counts: who has
counted least is missing. Where a connection breaks, the process that no longer writes has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, NoReturn, Self

import torch.distributed as dist

from fastchgnet.errors import InputError, ToldElsewhere, first_line
from fastchgnet.train.launcher import keeper, reason, speaks

_BEAT_SECONDS = 0.5
"""Between two reports of a process."""

_PATIENCE_SECONDS = 10.0
"""Beyond the time-out, in which the store may answer who is missing; a store that is frozen never does."""

_GRACE_SECONDS = 3.0
"""After which a process that has written nothing new has ended."""


class _Report(NamedTuple):
    """What a process writes about itself."""

    n_waits: int
    n_beats: int
    place: str
    host: str
    process: int

    def name(self, number: int) -> str:
        return f"rank {number} (process {self.process} on {self.host}, {self.place})"


class Watch:
    """Watch over one process of a run; a context, inside which a thread does so.

    Args:
        store: shared by the processes; a connection of its own, as the thread uses it.
        number: of this process.
        count: of all processes.
        timeout: seconds of waiting after which this process ends.
        stop: set where the launcher is gone: nobody would know of this process any more.

    Attributes:
        place: where the process is, for messages.
    """

    def __init__(
        self, store: dist.Store, number: int, count: int, timeout: float, stop: threading.Event
    ) -> None:
        self._number, self._count, self._timeout, self._stop = number, count, timeout, stop
        self._store = store
        self.place = "at the start"
        self._n_waits = self._n_beats = 0
        self._since: float | None = None
        self._ended = threading.Event()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._clock = threading.Thread(target=self._run_clock, name="clock", daemon=True)

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._thread.start()
        self._clock.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, and tell the others why if this is the end of the run."""
        self._ended.set()
        with self.waiting():
            self._thread.join()
            if error is not None:
                with contextlib.suppress(RuntimeError):
                    speaks(str(error) or type(error).__name__, self._store)
        self._left.set()
        self._clock.join()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for the others inside."""
        self._n_waits += 1
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def raise_lost(self, error: RuntimeError) -> NoReturn:
        """Say why a message did not arrive: raise InputError in the process that finds out first.

        Raises:
            InputError: another process has ended without a word, or the connection failed.
            ToldElsewhere: another process tells.
        """
        with self.waiting(), contextlib.suppress(RuntimeError):  # where the store is gone, too
            before = self._reports()
            deadline = time.monotonic() + _GRACE_SECONDS
            while time.monotonic() < deadline and reason(self._store) is None:
                time.sleep(_BEAT_SECONDS / 5)
            now = self._reports()
            text = f"lost contact with the other processes ({self.place}): {first_line(error)}"
            if dead := self._silent(before, now):
                text = f"{self._names(dead, now)} ended without a word; --resume goes on from the last state"
            if speaks(text, self._store):
                raise InputError(text) from error
            raise ToldElsewhere(reason(self._store) or text) from error
        raise InputError(
            f"lost contact with {keeper()} ({self.place}); --resume goes on from the last state"
        ) from error

    def _run(self) -> None:
        """Write reports, and end this process where it has waited too long or the run is over."""
        try:
            while not self._ended.wait(_BEAT_SECONDS):
                self._beat()
                waited = self._waited()
                if waited > self._timeout:
                    self._give_up()
                # a process that waits for GPUs is not told that their links are broken
                if waited > 2 * _GRACE_SECONDS and reason(self._store) is not None:
                    os._exit(2)
        except RuntimeError:
            self._stop.set()

    def _run_clock(self) -> None:
        """End this process where the store does not answer, and nobody can be named."""
        while not self._left.wait(_BEAT_SECONDS):
            if self._waited() > self._timeout + _PATIENCE_SECONDS:
                text = f"no answer from {keeper()} ({self.place}); --resume goes on from the last state"
                print(f"error: {text}", file=sys.stderr, flush=True)
                os._exit(2)

    def _waited(self) -> float:
        """Return for how many seconds the main thread has been waiting."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def _silent(self, before: dict[int, _Report], now: dict[int, _Report]) -> list[int]:
        """Return the other processes that have written nothing in between."""
        return [n for n in range(self._count) if n != self._number and now.get(n) == before.get(n)]

    def _beat(self) -> None:
        """Write a report."""
        self._n_beats += 1
        report = _Report(self._n_waits, self._n_beats, self.place, socket.gethostname(), os.getpid())
        self._store.set(str(self._number), json.dumps(report))

    def _reports(self) -> dict[int, _Report]:
        keys = [key for key in map(str, range(self._count)) if self._store.check([key])]
        return {int(key): _Report(*json.loads(self._store.get(key))) for key in keys}

    def _give_up(self) -> NoReturn:
        """End the process: its main thread waits in a library, where no exception can reach it."""
        before = self._reports()
        for _ in range(3):
            time.sleep(_BEAT_SECONDS)
            self._beat()
        now = self._reports()
        behind = [n for n in range(self._count) if n not in now or now[n].n_waits < self._n_waits]
        # one may have stopped after it had counted, and before it sent its message
        missing = behind or self._silent(before, now)
        who = f"{self._names(missing, now)} did not come" if missing else "messages did not arrive"
        text = f"{who} within {self._timeout:g} s; --resume goes on from the last state"
        if speaks(text, self._store):
            print(f"error: {text}", file=sys.stderr, flush=True)
        if self._number == 0 and keeper() == "rank 0":
            time.sleep(_GRACE_SECONDS)  # in which the others find the reason in its store, and stay silent
        os._exit(2)

    def _names(self, numbers: list[int], reports: dict[int, _Report]) -> str:
        return ", ".join(reports[n].name(n) if n in reports else f"rank {n}" for n in numbers)
