"""Which frames go together: batches of even size, and the shares of several ranks in one batch.

    sequential  as they come
    paper       FastCHGNet, Fig. 4: sorted by atoms + edges + angles; each group in turn takes the smallest
                and the largest of what remains
    lpt         longest processing time first, with a vector of loads: the time, and every kind of row. The
                largest of what remains joins the group g with the smallest product load_g . load_frame

With the time alone as the load, the last is the classic rule: the least loaded group is next. Groups that are
even in every kind of row are even in any time that is a sum over rows, so also where the fitted one errs, and
they fit the same static shapes.

Every process plans for itself and must find the same, so nothing here depends on the order in which a machine
adds, or on whether it has a compiler: loads are integers in floating point whose sums and products stay below
2^53 and are exact.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastchgnet.ops.cpu import groups, native

Strategy = Literal["sequential", "paper", "lpt"]
Sizes = NDArray[np.int64]
"""One row per frame: atoms, directed edges, short bonds, angles, and further counts to be kept even."""

_SCALE = 2**24
"""Total of a column of loads; two such columns, one times 3, multiply and add up to less than 2^53."""

_TIME = 3
"""Weight of the time among the loads: above each kind of row, not above all of them."""

_SLACK = 1.25
"""Most frames of a rank, relative to an even share: one with a giant may take few others."""


class Cost(NamedTuple):
    """Time of a step, in any unit: `step` once, the rest for each frame, atom, directed edge and angle."""

    frame: float
    atom: float
    edge: float
    angle: float
    step: float = 0.0

    def of(self, sizes: Sizes) -> NDArray[np.float64]:
        """Return what each frame adds to a step, [n]."""
        atoms, edges, _, angles = sizes.T[:4]
        return self.frame + self.atom * atoms + self.edge * edges + self.angle * angles


DEFAULT_COST = Cost(frame=0.0, atom=1.0, edge=0.10, angle=0.135)
"""Where nothing has been measured: millions of operations of a forward pass, four short bonds to an atom."""


def fit_cost(batches: NDArray[np.int64], seconds: NDArray[np.float64]) -> Cost:
    """Fit the cost to measured steps: least squares of the relative errors, no coefficient negative.

    Args:
        batches: [b, 5] systems, atoms, directed edges, short bonds and angles of each batch. Where all have
            as many systems, what a step takes in any case counts as the systems' own.
        seconds: [b] what their steps took, more than nothing.
    """
    rows = np.column_stack([batches[:, [0, 1, 2, 4]], np.ones(len(batches))]) / seconds[:, None]
    size = np.maximum(np.linalg.norm(rows, axis=0), np.finfo(float).tiny)
    best, least = np.zeros(5), math.inf
    # The solution is the unconstrained one on the columns where it is not zero, of which there are few sets.
    for n_columns in range(1, 6):
        for columns in map(list, itertools.combinations(range(5), n_columns)):
            found = np.linalg.lstsq(rows[:, columns] / size[columns], np.ones(len(rows)), rcond=None)[0]
            error = float(np.linalg.norm(rows[:, columns] / size[columns] @ found - 1))
            if (found >= 0).all() and error < (1 - 1e-9) * least:
                best, least = np.zeros(5), error
                best[columns] = found / size[columns]
    return Cost(*best.tolist())


def share(
    sizes: Sizes, n_ranks: int, strategy: Strategy = "lpt", cost: Cost = DEFAULT_COST
) -> list[NDArray[np.int64]]:
    """Divide the frames of a global batch among ranks.

    Returns:
        For each rank the places of its frames in `sizes`, ascending; none where there are fewer frames than
        ranks. Numbers of frames may differ, those of `lpt` are at most 1.25 times an even share, rounded up.
    """
    most = np.full(n_ranks, math.ceil(_SLACK * len(sizes) / n_ranks))
    if strategy == "lpt":
        return _longest_first(_loads(sizes, cost), most, np.ones(len(sizes)))
    return pack(sizes, n_ranks, strategy)


def pack(
    sizes: Sizes, n_batches: int, strategy: Strategy = "lpt", noise: NDArray[np.float64] | None = None
) -> list[NDArray[np.int64]]:
    """Divide frames among batches of equal numbers of frames, but for one.

    Args:
        sizes: of the frames.
        n_batches: number of batches.
        strategy: how they are divided.
        noise: [n] random factors of the sizes by which frames are sorted, and of nothing else: without them
            the same frames would always meet again.

    Returns:
        For each batch the places of its frames in `sizes`, ascending.
    """
    n_frames = len(sizes)
    noise = np.ones(n_frames) if noise is None else noise
    if strategy == "sequential":
        return np.array_split(np.arange(n_frames), n_batches)
    if strategy == "paper":
        return _smallest_with_largest(sizes, n_batches, noise)
    most = n_frames // n_batches + (np.arange(n_batches) < n_frames % n_batches)
    return _longest_first(_loads(sizes, DEFAULT_COST), most, noise)


def _smallest_with_largest(
    sizes: Sizes, n_groups: int, noise: NDArray[np.float64]
) -> list[NDArray[np.int64]]:
    """Deal pairs; of those in the middle, too few for a pair each, every group gets as many, but for one."""
    order = np.argsort(noise * sizes[:, [0, 1, 3]].sum(1), kind="stable")
    n_paired = len(order) // (2 * n_groups) * n_groups
    smallest, largest = order[:n_paired], order[::-1][:n_paired]
    middle = order[n_paired : len(order) - n_paired]
    return [
        np.sort(np.concatenate([part[group::n_groups] for part in (smallest, largest, middle)]))
        for group in range(n_groups)
    ]


def _loads(sizes: Sizes, cost: Cost) -> NDArray[np.float64]:
    """Time and rows of each frame as shares of the totals, in integers, [n, 1 + kinds of rows]."""
    time = cost.of(sizes)
    whole = np.rint(_SCALE * (time / time.max(initial=np.finfo(float).tiny)))
    table = np.column_stack([whole, sizes]).astype(np.float64)
    weight = np.array([_TIME] + [1] * sizes.shape[1])
    return np.rint(table * (weight * _SCALE / table.sum(0).clip(1)))


def _longest_first(
    loads: NDArray[np.float64], most: NDArray[np.int64], noise: NDArray[np.float64]
) -> list[NDArray[np.int64]]:
    """Place the frames, the largest first, and collect the groups."""
    order = np.argsort(-noise * loads.sum(1), kind="stable")
    compiled = native.library()
    place = _place if compiled is None else partial(groups.place, compiled)
    group_of = np.empty(len(loads), dtype=np.int64)
    group_of[order] = place(loads[order], most)
    return np.split(
        np.argsort(group_of, kind="stable"), np.bincount(group_of, minlength=len(most)).cumsum()[:-1]
    )


def _place(loads: NDArray[np.float64], most: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place frames, in turn, in the group whose load has the smallest product with theirs.

    There the sum over the groups of their squared loads grows least. A full group takes no more; of equal
    products the first counts.
    """
    taken = np.zeros((len(most), loads.shape[1]))
    of_group = list(taken)
    full = np.where(most > 0, 0.0, np.inf)
    room = most.tolist()
    score = np.empty(len(most))
    group_of = np.empty(len(loads), dtype=np.int64)
    for frame, load in enumerate(loads):
        np.dot(taken, load, out=score)
        score += full
        group_of[frame] = chosen = int(score.argmin())
        of_group[chosen] += load
        room[chosen] -= 1
        if room[chosen] == 0:
            full[chosen] = np.inf
    return group_of
