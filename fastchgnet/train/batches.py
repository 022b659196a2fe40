"""Which frames make which batch, and having the next one ready in time."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Argument = TypeVar("Argument")
Item = TypeVar("Item")


def epoch_batches(n_frames: int, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Cut a random order of 0..n_frames-1 into batches of nearly equal size, at most `batch_size`.

    The order depends on nothing but `seed` and `epoch`.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n_frames)
    return np.array_split(order, math.ceil(n_frames / batch_size))


def prefetch(
    make: Callable[[Argument], Item], arguments: Iterable[Argument], depth: int = 2
) -> Iterator[Item]:
    """Yield make(argument) for every argument, in order, made by a thread up to `depth` items ahead.

    An exception in `make` is raised here, in its turn. The thread ends with the iterator.
    """
    todo = iter(arguments)
    worker = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ready = deque(worker.submit(make, argument) for argument in itertools.islice(todo, depth))
        while ready:
            item = ready.popleft().result()
            ready.extend(worker.submit(make, argument) for argument in itertools.islice(todo, 1))
            yield item
    finally:
        worker.shutdown(cancel_futures=True)
