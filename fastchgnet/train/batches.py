"""Which frames make which batch, and having the next one ready in time."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fastchgnet.train.sampler import Sizes, Strategy, pack, share

Argument = TypeVar("Argument")
Item = TypeVar("Item")


_POOL_BATCHES = 32
"""Batches, about, whose frames are divided among them anew: enough for even ones."""

_POOL_FRAMES = 2048
"""Most frames of such a pool, about: larger batches are even as they come, and planning takes time."""

_NOISE = 0.25
"""Of the sizes by which frames are sorted: enough that no two frames meet more often than by chance."""


class Batches:
    """The batches of a run, epoch by epoch, the same on every device and for any number of processes.

    An epoch is a random order of the frames, cut into pools of some batches. Each pool is divided into its
    batches by a strategy of the sampler, and they come in random order: every frame comes once in an epoch,
    and in any batch of its pool equally likely.

    Args:
        sizes: counts of each frame, as the sampler takes them.
        batch_size: most frames in a batch; all have as many, but for one.
        seed: of the run. Nothing but seed, epoch, sizes and strategy decides.
        strategy: how a pool is divided.
    """

    def __init__(self, sizes: Sizes, batch_size: int, seed: int, strategy: Strategy = "lpt") -> None:
        self.sizes, self._seed, self._strategy = sizes, seed, strategy
        self._n_batches = math.ceil(len(sizes) / batch_size)
        pool = min(_POOL_BATCHES, max(1, _POOL_FRAMES // batch_size))
        self._n_pools = max(1, round(self._n_batches / pool))

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return self._n_batches

    def epoch(self, number: int) -> Iterator[NDArray[np.int64]]:
        """Yield the batches of an epoch as places in `sizes`, each pool divided when its turn comes."""
        generator = np.random.default_rng([self._seed, number])
        cut = np.array_split(generator.permutation(len(self.sizes)), self._n_batches)
        if self._strategy == "sequential" or self._n_pools == self._n_batches:
            yield from cut
            return
        for numbers in np.array_split(np.arange(self._n_batches), self._n_pools):
            pool = np.concatenate(cut[numbers[0] : numbers[-1] + 1])
            noise = generator.uniform(1 - _NOISE, 1 + _NOISE, len(pool))
            packed = pack(self.sizes[pool], len(numbers), self._strategy, noise)
            # in random order, since the first ones tend to hold the largest frames
            for place in generator.permutation(len(packed)):
                yield pool[packed[place]]

    def fingerprint(self) -> str:
        """Hash what decides, so that a run is not resumed, or shared, with other batches."""
        rule = f"1 {self._strategy} {self._seed} {self._n_batches} {self._n_pools}"  # 1: version of the rule
        sizes = np.ascontiguousarray(self.sizes, dtype="<i8")
        return hashlib.sha256(rule.encode() + sizes.tobytes()).hexdigest()


class Division:
    """How every batch is divided among processes, and each share into parts that are taken in turn.

    Each process plans for all, and finds the same.

    Args:
        sizes: counts of each frame, as the sampler takes them.
        strategy: how a batch is divided.
        n_ranks: processes.
        n_parts: parts of each share.
    """

    def __init__(self, sizes: Sizes, strategy: Strategy = "lpt", n_ranks: int = 1, n_parts: int = 1) -> None:
        self._sizes, self._strategy = sizes, strategy
        self.n_ranks, self.n_parts = n_ranks, n_parts

    def __call__(self, batch: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return the parts of a batch, those of the first process first; few frames leave some empty."""
        count = self.n_ranks * self.n_parts
        if count == 1:
            return [batch]
        return [batch[places] for places in share(self._sizes[batch], count, self._strategy)]

    def own(self, parts: list[NDArray[np.int64]], rank: int) -> list[NDArray[np.int64]]:
        """Return those of one process."""
        return parts[rank * self.n_parts : (rank + 1) * self.n_parts]

    def halved(self) -> Division:
        """Return the division into twice as many parts."""
        return Division(self._sizes, self._strategy, self.n_ranks, 2 * self.n_parts)


def validation_batches(n_frames: int, batch_size: int, division: Division) -> list[NDArray[np.int64]]:
    """Cut frames, in their order, into batches about as large as a part of a training batch."""
    size = math.ceil(batch_size / (division.n_ranks * division.n_parts))
    return np.array_split(np.arange(n_frames), math.ceil(n_frames / size))


def prefetch(
    make: Callable[[Argument], Item], arguments: Iterable[Argument], depth: int = 2
) -> Iterator[Item]:
    """Yield make(argument) for every argument, in order, made by a thread up to `depth` items ahead.

    An exception in `make` is raised here, in its turn. The thread ends with the iterator.
    """
    todo = map(make, arguments)  # drawn by the thread, since planning the next batches takes time as well
    worker = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ready = deque(worker.submit(next, todo, None) for _ in range(depth))
        while (item := ready.popleft().result()) is not None:
            ready.append(worker.submit(next, todo, None))
            yield item
    finally:
        worker.shutdown(cancel_futures=True)
