"""The processes of a run: who this one is, what they agree on, and what is said when one of them is lost.

`torchrun` starts them. One process alone takes the same path, where everything here does nothing.
"""

from __future__ import annotations

import datetime
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastchgnet.device import pick_device
from fastchgnet.errors import InputError, ToldElsewhere, first_line
from fastchgnet.train.launcher import await_store, check_launcher, connect, is_alone, meet
from fastchgnet.train.watch import Watch

T = TypeVar("T")

_SPARE_SECONDS = 60.0
"""By which the libraries' own time-outs are longer than ours, which names the process that is missing."""


class Ranks:
    """The processes that share a run, seen from one of them.

    Attributes:
        number: of this process, from 0.
        count: of all processes.
    """

    def __init__(self, number: int = 0, count: int = 1, watch: Watch | None = None) -> None:
        self.number, self.count = number, count
        self._watch = watch
        self._links: dist.ProcessGroup | None = None  # between GPUs; None for those between processes

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.number == 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for the others inside, as all of them do; raise InputError where they cannot be reached."""
        if self._watch is None:
            yield
            return
        try:
            with self._watch.waiting():
                yield
        except RuntimeError as error:  # of the libraries that carry messages
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise  # nothing is sent while steps are recorded; recording is given up
            self._watch.raise_lost(error)

    def at(self, place: str) -> None:
        """Note where this process is, for messages."""
        if self._watch is not None:
            self._watch.place = place

    def gather(self, value: T) -> list[T]:
        """Return the value that each process gives."""
        if self.count == 1:
            return [value]
        found: list[T] = [value] * self.count
        with self.waiting():
            dist.all_gather_object(found, value)
        return found

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the processes."""
        if self.count > 1:
            with self.waiting():
                for tensor in tensors:
                    dist.all_reduce(tensor, group=self._group(tensor))
                _await_gpu(tensors)

    def from_first_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of the first process."""
        if self.count > 1:
            with self.waiting():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0, group=self._group(tensor))
                _await_gpu(tensors)

    def start_sum(self, tensor: Tensor) -> dist.Work:
        """Begin to replace a tensor by its sum over the processes; `waiting`, wait for what is returned."""
        with self.waiting():
            return dist.all_reduce(tensor, group=self._group(tensor), async_op=True)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do inside what may fail in one process: where it does, all raise InputError.

        The first process raises what is to be printed, the others `ToldElsewhere`.
        """
        text = None
        try:
            yield
        except (InputError, OSError) as error:
            if self.count == 1:
                raise
            text = str(error)
        texts = self.gather(text)
        failed = [number for number, one in enumerate(texts) if one is not None]
        if failed:
            whose = "" if texts[0] is not None else f"rank {failed[0]}: "
            self.refuse(f"{whose}{texts[failed[0]]}")

    def refuse(self, text: str) -> NoReturn:
        """Raise, in all processes, an error that they know of all: InputError in the first."""
        raise (InputError if self.first else ToldElsewhere)(text)

    def agree(self, facts: Mapping[str, str]) -> None:
        """Make sure that facts are the same in all processes.

        Raises:
            InputError: they are not; names the first process that differs, and what in.
        """
        for number, theirs in enumerate(self.gather(dict(facts))):
            names = sorted(
                name for name in facts.keys() | theirs.keys() if facts.get(name) != theirs.get(name)
            )
            with self.together():
                if names and self.first:
                    raise InputError(
                        f"rank {number} differs from rank 0 in {', '.join(names)}; all processes of a run "
                        "need the same configuration, data and versions"
                    )

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._links if tensor.is_cuda else None

    def _own_device(self, name: str, local: int) -> torch.device:
        """Return the device of this process, which is number `local` of those on its machine."""
        kind = "cuda" if name == "auto" and torch.cuda.is_available() else name
        if kind.startswith("cuda:"):
            raise InputError(f"train.device: {name} is one GPU; several processes need one each: use cuda")
        if kind == "cuda" and torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                raise InputError(
                    f"this machine has {torch.cuda.device_count()} GPUs, and {local + 1} processes or more"
                )
            torch.cuda.set_device(local)
        return pick_device(kind)

    def _link(self, device: torch.device, timeout: datetime.timedelta) -> None:
        """Connect the GPUs of the processes."""
        if device.type == "cuda":
            with self.waiting():
                self._links = dist.new_group(backend="nccl", timeout=timeout, device_id=device)


def _await_gpu(tensors: Sequence[Tensor]) -> None:
    """Have the host wait for messages between GPUs here, where the watch knows that it waits for others."""
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.current_stream().synchronize()


ALONE = Ranks()
"""One process that shares its run with nobody."""


@contextmanager
def joined(device: str, timeout: float, stop: threading.Event) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that torchrun has started, if it has, and pick this one's device.

    Args:
        device: name of the device, as `pick_device` takes it.
        timeout: seconds that a process waits for another before all end.
        stop: set where the launcher is lost: nobody would know of these processes any more.

    Raises:
        InputError: no such device, or fewer GPUs than processes; another process has ended or hangs; the
            caller has a process group already.
    """
    if is_alone():
        own = pick_device(device)
        if own.type == "cuda":
            torch.cuda.set_device(own)  # streams, events and graphs are those of the current device
        yield ALONE, own
        return
    if dist.is_initialized():
        raise InputError("torch.distributed has a process group already; training makes one of its own")
    check_launcher()
    limit = datetime.timedelta(seconds=timeout + _SPARE_SECONDS)
    await_store(timeout, stop)
    try:
        store, own_store = (connect(limit.total_seconds()) for _ in range(2))
        name = meet(store, timeout, stop)
    except RuntimeError as error:
        raise InputError(f"cannot reach the other processes: {first_line(error)}") from error
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ranks: Ranks | None = None
    ended_well = False
    try:
        with Watch(dist.PrefixStore(f"{name}/watch", own_store), number, count, timeout, stop) as watch:
            ranks = Ranks(number, count, watch)
            group = dist.PrefixStore(f"{name}/group", store)
            with ranks.waiting():
                # messages between hosts; the GPUs get links of their own
                dist.init_process_group("gloo", store=group, rank=number, world_size=count, timeout=limit)
            with ranks.together():
                own = ranks._own_device(device, int(os.environ.get("LOCAL_RANK", number)))
            ranks.agree({"train.device": own.type})
            ranks._link(own, limit)
            yield ranks, own
            ranks.gather(None)  # nobody leaves while another may need it
            ended_well = True
    finally:
        # after an error NCCL might wait for the others forever; the end of the process ends its links, too
        if dist.is_initialized() and (ended_well or ranks is None or ranks._links is None):
            dist.destroy_process_group()
