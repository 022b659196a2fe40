"""Dividing frames among ranks and batches: complete, even, and the same on every machine."""

from __future__ import annotations

import itertools
import math
import operator
import typing

import numpy as np
import pytest

from fastchgnet.bench.frames import Composition
from fastchgnet.bench.roofline import forward_operations
from fastchgnet.ops.cpu import groups as compiled_groups
from fastchgnet.ops.cpu import native
from fastchgnet.train import sampler
from fastchgnet.train.sampler import DEFAULT_COST, Cost, Strategy, fit_cost, pack, share

STRATEGIES: tuple[Strategy, ...] = typing.get_args(Strategy)


def made_up(n_frames: int, seed: int = 0) -> np.ndarray:
    """Sizes with the long tail of crystals; rows per atom differ from frame to frame."""
    rng = np.random.default_rng(seed)
    atoms = rng.lognormal(3.1, 0.8, n_frames).astype(np.int64) + 1
    per_atom = rng.lognormal(0, 0.5, (n_frames, 4)) * [67, 4, 70, 400]
    return np.column_stack([atoms, (atoms[:, None] * per_atom).astype(np.int64)])


def assert_same_plan(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert [group.tolist() for group in found] == [group.tolist() for group in expected]


def efficiency(sizes: np.ndarray, groups: list[np.ndarray], cost: Cost = DEFAULT_COST) -> float:
    loads = np.array([cost.of(sizes[group]).sum() for group in groups])
    return loads.mean() / loads.max()


EQUAL = np.tile([4, 200, 16, 180], (24, 1))
GIANT = np.concatenate([EQUAL, [[444, 40_000, 1800, 90_000]]])
FLAT = np.column_stack([np.arange(1, 31), 50 * np.arange(1, 31), np.zeros((30, 2), np.int64)])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("n_groups", [1, 2, 3, 8, 32])
@pytest.mark.parametrize(
    "sizes",
    [made_up(100), made_up(64)[:, :4], made_up(5), EQUAL, GIANT, FLAT, made_up(1), made_up(0)],
    ids=["100", "64", "5", "equal", "giant", "no angles", "one", "none"],
)
def test_every_frame_has_one_place(strategy: Strategy, n_groups: int, sizes: np.ndarray) -> None:
    n_frames = len(sizes)
    for divide in (share, pack):
        groups = divide(sizes, n_groups, strategy)
        assert len(groups) == n_groups
        assert all(group.dtype == np.int64 and (np.diff(group) > 0).all() for group in groups)
        assert sorted(np.concatenate(groups)) == list(range(n_frames))
        counts = [len(group) for group in groups]
        if divide is pack or strategy != "lpt":
            assert max(counts) - min(counts) <= 1
        assert max(counts) <= math.ceil(1.25 * n_frames / n_groups)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fewer_frames_than_ranks_leave_some_idle(strategy: Strategy) -> None:
    counts = sorted(len(group) for group in share(made_up(5), 8, strategy))
    assert counts == [0, 0, 0, 1, 1, 1, 1, 1]


def test_the_papers_rule_takes_the_smallest_and_the_largest_in_turn() -> None:
    """Fig. 4 in the order of the sums, with a middle that is too small for pairs."""
    features = np.array([7, 1, 9, 3, 5, 8, 2, 6, 4, 10, 11])
    sizes = np.column_stack(
        [features, 0 * features, 100 - features, 0 * features]
    )  # short bonds do not count
    groups = [sorted(features[group]) for group in share(sizes, 2, "paper")]
    assert groups == [[1, 3, 5, 7, 9, 11], [2, 4, 6, 8, 10]]


def test_a_giant_gets_little_company() -> None:
    groups = share(GIANT, 4, "lpt")
    alone = next(group for group in groups if 24 in group)
    assert len(alone) == min(len(group) for group in groups) == 1
    # it cannot be divided: no plan does better
    assert efficiency(GIANT, groups) == pytest.approx(
        DEFAULT_COST.of(GIANT).sum() / 4 / DEFAULT_COST.of(GIANT).max()
    )


def test_equal_frames_are_dealt_evenly() -> None:
    for n_ranks in (2, 3, 8, 24):
        assert {len(group) for group in share(EQUAL, n_ranks, "lpt")} == {24 // n_ranks}


def test_lpt_is_close_to_the_best_of_all_plans() -> None:
    """Against every way to divide eight frames between two ranks; the rule itself promises 7/6."""
    for seed in range(10):
        sizes = made_up(8, seed)
        time = DEFAULT_COST.of(sizes)
        best = min(
            max(time[list(one)].sum(), time.sum() - time[list(one)].sum())
            for n in range(1, 6)
            for one in itertools.combinations(range(8), n)
        )
        found = max(time[group].sum() for group in share(sizes, 2, "lpt"))
        assert found <= 1.25 * best


@pytest.mark.parametrize(("n_ranks", "per_rank"), [(4, 32), (32, 64)])
def test_lpt_is_even_in_time_and_in_every_kind_of_row(n_ranks: int, per_rank: int) -> None:
    sizes = made_up(n_ranks * per_rank)
    reached = {strategy: efficiency(sizes, share(sizes, n_ranks, strategy)) for strategy in STRATEGIES}
    assert reached["sequential"] < reached["paper"] < 0.97 < 0.99 < reached["lpt"]
    groups = share(sizes, n_ranks, "lpt")
    rows = np.array([sizes[group].sum(0) for group in groups])
    assert (rows.mean(0) / rows.max(0) > 0.95).all()
    # so that a cost that errs in every coefficient changes little: a sum is as even as its parts
    for wrong in (Cost(0, 9.0, 0.03, 0.1), Cost(0, 0, 0.3, 0.02), Cost(0, 1.0, 0, 0.5)):
        assert efficiency(sizes, groups, wrong) > 0.95


def test_frames_that_share_no_kind_of_row_are_spread_too() -> None:
    """Atoms without neighbours beside crystals without a short bond."""
    lonely, wide = np.tile([40, 0, 0, 0], (16, 1)), np.tile([1, 90, 0, 0], (16, 1))
    groups = pack(np.concatenate([lonely, wide]), 8, "lpt")
    assert all((group < 16).sum() == 2 for group in groups)


def test_plans_are_the_same_in_whatever_order_a_machine_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = made_up(300)
    expected = share(sizes, 7, "lpt")

    def backwards(taken: np.ndarray, load: np.ndarray, out: np.ndarray) -> None:
        out[:] = sum((taken[:, k] * load[k] for k in reversed(range(len(load)))), start=np.zeros(len(out)))

    monkeypatch.setattr(np, "dot", backwards)
    with native.disabled():
        found = share(sizes, 7, "lpt")
    assert_same_plan(found, expected)


def placed_exactly(loads: np.ndarray, most: np.ndarray) -> list[int]:
    """Place frames as the sampler says, in integers of any length."""
    rows, room = [[0] * loads.shape[1] for _ in most], most.tolist()
    group_of = []
    for load in loads.astype(np.int64).tolist():
        open_ones = [group for group, left in enumerate(room) if left > 0]
        products = [sum(map(operator.mul, rows[group], load)) for group in open_ones]
        chosen = open_ones[products.index(min(products))] if open_ones else 0
        rows[chosen] = list(map(operator.add, rows[chosen], load))
        room[chosen] -= 1
        group_of.append(chosen)
    return group_of


def assert_placed_exactly(loads: np.ndarray, most: np.ndarray) -> None:
    """Compare both bodies with integers."""
    expected = placed_exactly(loads, most)
    assert sampler._place(loads, most).tolist() == expected
    if (compiled := native.library()) is not None:
        assert compiled_groups.place(compiled, loads, most).tolist() == expected


@pytest.mark.parametrize("largest", [0, 1, 3, 1000, 2**20])
def test_both_bodies_place_frames_as_integers_do(largest: int) -> None:
    """Small numbers tie, groups are closed or become full, and there may be no room for all."""
    rng = np.random.default_rng(largest)
    for _ in range(40):
        n_frames, n_loads, n_groups = rng.integers([0, 1, 1], [80, 8, 41])
        loads = rng.integers(0, largest, (n_frames, n_loads), endpoint=True)
        assert_placed_exactly(loads.astype(float), rng.integers(0, 7, n_groups))


HEAVY = (np.random.default_rng(0).pareto(0.6, (500, 5)) * 100).astype(np.int64) + 1


@pytest.mark.parametrize("n_groups", [1, 7, 8, 9, 32])
@pytest.mark.parametrize(
    "sizes",
    [made_up(500), np.repeat(made_up(40), 10, 0), HEAVY, EQUAL, GIANT, FLAT, made_up(3), made_up(0)],
    ids=["500", "ties", "heavy tail", "equal", "giant", "no angles", "three", "none"],
)
def test_both_bodies_make_the_same_plans(n_groups: int, sizes: np.ndarray) -> None:
    noise = np.random.default_rng(1).uniform(0.75, 1.25, len(sizes))
    plans = share(sizes, n_groups), pack(sizes, n_groups, "lpt", noise)
    with native.disabled():
        assert_same_plan(share(sizes, n_groups), plans[0])
        assert_same_plan(pack(sizes, n_groups, "lpt", noise), plans[1])
    loads = sampler._loads(sizes, DEFAULT_COST)
    assert_placed_exactly(loads, np.full(n_groups, math.ceil(1.25 * len(sizes) / n_groups)))


def test_the_plan_of_a_large_batch_is_that_of_integers() -> None:
    sizes = made_up(4096)
    sizes[7] = np.iinfo(np.int32).max
    loads = sampler._loads(sizes, DEFAULT_COST)
    assert (loads == np.rint(loads)).all() and loads.sum(0).max() > 2**25
    assert_placed_exactly(loads[np.argsort(-loads.sum(1), kind="stable")], np.full(32, 160))


def test_planning_is_compiled_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(sampler, "_place", None)
    share(EQUAL, 2)
    with native.disabled(), pytest.raises(TypeError):
        share(EQUAL, 2)


def test_large_counts_stay_exact() -> None:
    """The largest numbers that loads can have: everything in one frame, beside a pool of small ones."""
    sizes = np.ones((4096, 5), np.int64)
    sizes[0] = np.iinfo(np.int32).max
    groups = share(sizes, 2, "lpt")
    assert min(len(group) for group in groups) == 4096 - math.ceil(1.25 * 2048)


def test_the_default_cost_is_that_of_the_operations() -> None:
    sizes = made_up(50)
    sizes[:, 2] = 4 * sizes[:, 0]
    counted = [forward_operations(Composition(1, *row[:4])) / 1e6 for row in sizes.tolist()]
    np.testing.assert_allclose(DEFAULT_COST.of(sizes), counted, rtol=0.03)  # two digits were kept


def test_the_cost_is_fitted_to_measured_steps() -> None:
    rng = np.random.default_rng(0)
    frames = made_up(2000)[:, :4]
    sizes = np.array([[n, *frames[rng.choice(2000, n)].sum(0)] for n in (4, 8, 16, 32) * 10])
    truth = Cost(frame=2e-4, atom=3e-5, edge=4e-6, angle=7e-6, step=3e-3)
    seconds = sizes[:, [0, 1, 2, 4]] @ np.array(truth[:4]) + truth.step
    np.testing.assert_allclose(fit_cost(sizes, seconds), truth, rtol=1e-6)
    noisy = fit_cost(sizes, seconds * rng.normal(1, 0.02, len(seconds)))
    assert noisy.of(frames).sum() == pytest.approx(truth.of(frames).sum(), rel=0.05)


def test_no_fitted_coefficient_is_negative() -> None:
    """Steps that get faster with more angles: noise, and no reason to collect angles."""
    sizes = np.array([[4, 40, 2000, 100, n] for n in (1000, 2000, 3000, 4000)])
    fitted = fit_cost(sizes, np.array([0.5, 0.4, 0.3, 0.2]))
    assert min(fitted) == 0 and fitted.angle == 0 and max(fitted) > 0
    no_angles = fit_cost(np.array([[1, 4, 50, 0, 0], [2, 8, 200, 0, 0]]), np.array([1.0, 2.0]))
    assert no_angles.angle == 0 and np.isfinite(no_angles).all()
