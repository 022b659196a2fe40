"""What torchrun tells the processes that it starts, and the store through which they find each other."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import socket
import threading
import time
import uuid

import torch.distributed as dist

from fastchgnet.errors import InputError, ToldElsewhere

_PAUSE_SECONDS = 0.02

_REASON = "reason"
"""Key under which the first process that ends says why; those that find one there end without a word."""


def is_alone() -> bool:
    """Tell whether this process shares its run with no other."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def check_launcher() -> None:
    """Raise InputError where something has set WORLD_SIZE that is no launcher."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is set without {', '.join(missing)}; start the processes with torchrun")


def is_first() -> bool:
    """Tell whether this process is the only one of its run, or the one that prints."""
    return is_alone() or os.environ.get("RANK") == "0"


def is_restarted() -> bool:
    """Tell whether this process takes the place of one that ended."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def connect(timeout: float) -> dist.Store:
    """Connect to the store; every thread needs a connection of its own, as calls of another may wait.

    Where the launcher keeps no store, the first process does, for as long as it holds the first connection.
    """
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_first() and not _launcher_keeps_store(),
        timeout=datetime.timedelta(seconds=timeout),
        wait_for_workers=False,
        multi_tenant=True,
    )


def await_store(timeout: float, stop: threading.Event) -> None:
    """Wait until the first process keeps its store: `connect` would, but hears of no signal meanwhile.

    Raises:
        InputError: it does not within `timeout` seconds, or before `stop` was set.
    """
    if is_first() or _launcher_keeps_store():
        return
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and not stop.is_set():
        with contextlib.suppress(OSError):
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection(address, timeout=1).close()
            return
        time.sleep(_PAUSE_SECONDS)
    raise InputError(f"rank 0 had not come to the start of the run when {_when(timeout, stop)}")


def meet(store: dist.Store, timeout: float, stop: threading.Event) -> str:
    """Wait for all processes, and return a name for their meeting that no processes before them had.

    A launcher that restarts processes, or goes on with more or fewer of them, keeps its store, and what the
    former ones wrote there must not be found. So each process writes a number of its own. The first one
    proposes the list of numbers that it finds, and again where they change, until all find their own in it.

    Raises:
        InputError: some did not come within `timeout` seconds, or before `stop` was set.
        ToldElsewhere: another process that came tells so.
    """
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mine = uuid.uuid4().hex
    store.set(f"here/{number}", mine)
    deadline, seconded = time.monotonic() + timeout, ""
    while time.monotonic() < deadline and not stop.is_set():
        if number == 0:
            keys = [f"here/{n}" for n in range(count)]
            if store.check(keys):
                store.set("proposal", ",".join(store.get(key).decode() for key in keys))
        proposal = store.get("proposal").decode() if store.check(["proposal"]) else ""
        named = proposal.split(",")
        if len(named) == count and named[number] == mine:
            name = hashlib.sha256(proposal.encode()).hexdigest()[:16]
            n_seconded = store.add(f"seconded/{name}", int(seconded != name))
            seconded = name
            if n_seconded == count:
                return name
        time.sleep(_PAUSE_SECONDS)
    raise _not_met(store, count, _when(timeout, stop))


def _when(timeout: float, stop: threading.Event) -> str:
    return "this was stopped" if stop.is_set() else f"{timeout:g} s had passed"


def _not_met(store: dist.Store, count: int, when: str) -> InputError:
    """Return what to raise where some did not come: one of those who did prints it."""
    numbers = [store.get(f"here/{n}") if store.check([f"here/{n}"]) else None for n in range(count)]
    missing = [str(n) for n, one in enumerate(numbers) if one is None]
    who = f"rank {', '.join(missing)}" if missing else "some of the processes"
    text = f"{who} had not come to the start of the run when {when}"
    # beside the number of the first one who came, as former processes may have said something, too
    met = next(one for one in numbers if one is not None).decode()
    return InputError(text) if speaks(text, dist.PrefixStore(f"late/{met}", store)) else ToldElsewhere(text)


def speaks(text: str, store: dist.Store) -> bool:
    """Tell whether this process is the first of its run to give a reason for ending; it prints it."""
    mine = f"rank {os.environ['RANK']}: {text}"
    return store.compare_set(_REASON, "", mine).decode() == mine


def reason(store: dist.Store) -> str | None:
    """Return what another process has said about the end of the run, if it has ended."""
    return store.get(_REASON).decode() if store.check([_REASON]) else None


def told_once(error: InputError) -> InputError:
    """Return what to raise for an error that processes meet before they have joined: one prints it."""
    if is_alone() or not _launcher_keeps_store():
        return error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        first = speaks(str(error), dist.PrefixStore(f"before/{attempt}", connect(timeout=60)))
    except RuntimeError:  # the launcher is gone
        return error
    return error if first else ToldElsewhere(str(error))


def keeper() -> str:
    """Name the process that keeps the store."""
    return "the launcher" if _launcher_keeps_store() else "rank 0"


def _launcher_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
