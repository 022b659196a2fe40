"""Relaxation of many crystals against ASE's optimizer on one, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc100
from ase.constraints import FixAtoms, FixedPlane
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from crystals import benzene, crystals, potential, rattled

import fastchgnet
from fastchgnet.config import ModelConfig
from fastchgnet.errors import InputError
from fastchgnet.graph import Output
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.potential import Potential
from fastchgnet.sim.calculator import FastCHGNetCalculator
from fastchgnet.sim.relax import Relaxation, relax, relax_each
from fastchgnet.sim.relax import loop as relax_module
from fastchgnet.sim.relax.cell_filter import CellMode, log_matrix
from fastchgnet.sim.relax.result import Relaxed, Settings
from fastchgnet.sim.relax.room import Room, free_memory, needed_bytes

PRESSURE = 0.02  # eV/A^3
N_STEPS = 9
# Both do the same arithmetic in float64, in another order; the network and the steps amplify its rounding.
CLOSE = {"rtol": 0, "atol": 1e-8}

FILTERS = {
    "full": {},
    "hydrostatic": {"hydrostatic_strain": True},
    "constant-volume": {"constant_volume": True},
    "xx,yy,xy": {"mask": [1, 1, 0, 0, 0, 1]},
    "xz": {"mask": [0, 0, 0, 0, 1, 0]},
    "fixed": None,
}


SMALL = ModelConfig(atom_cutoff=4.0, n_radial=5, n_angular=5, readout_hidden=(16,))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Leave small crystals to one thread: on a busy machine several would wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def model() -> Potential:
    """Return a potential that is quick and means nothing."""
    return potential(SMALL)


@pytest.fixture(scope="module")
def trained() -> Potential:
    return fastchgnet.load("chgnet-0.3.0")


def by_ase(model, atoms: Atoms, settings: Settings) -> tuple[Atoms, np.ndarray, np.ndarray]:
    """Relax by ASE; return the crystal, energies and fmaxs."""
    atoms = atoms.copy()
    atoms.calc = FastCHGNetCalculator(model)
    options = FILTERS[settings.cell]
    target = atoms
    if options is not None and atoms.pbc.all():
        target = FrechetCellFilter(atoms, scalar_pressure=settings.pressure, **options)
    rows = []
    optimizer = FIRE(target, logfile=None)
    optimizer.attach(
        lambda: rows.append((atoms.get_potential_energy(), np.linalg.norm(target.get_forces(), axis=1).max()))
    )
    optimizer.run(fmax=settings.fmax, steps=settings.max_steps)
    return atoms, *np.array(rows).T


def assert_same(relaxed: Relaxed, expected: tuple[Atoms, np.ndarray, np.ndarray]) -> None:
    atoms, energies, fmaxs = expected
    assert relaxed.n_steps == len(energies) - 1
    np.testing.assert_allclose(relaxed.energies, energies, **CLOSE)
    np.testing.assert_allclose(relaxed.fmaxs, fmaxs, **CLOSE)
    np.testing.assert_allclose(relaxed.positions, atoms.positions, **CLOSE)
    np.testing.assert_allclose(relaxed.cell, atoms.cell.array, **CLOSE)
    np.testing.assert_allclose(relaxed.forces, atoms.calc.results["forces"], **CLOSE)


@pytest.mark.parametrize("cell", FILTERS)
def test_every_step_is_that_of_ase(model, cell) -> None:
    settings = Settings(fmax=1e-3, max_steps=N_STEPS, cell=cell, pressure=PRESSURE)
    chosen = crystals()[:2]
    for atoms, relaxed in zip(chosen, relax(model, chosen, settings), strict=True):
        assert_same(relaxed, by_ase(model, atoms, settings))


def test_fixed_atoms_and_open_axes_are_those_of_ase(model) -> None:
    held = crystals()[1]
    held.set_constraint(FixAtoms([0, 3]))
    slab = fcc100("Al", (1, 1, 3), vacuum=5.0)
    slab.positions[2, 2] += 0.2
    slab.set_constraint(FixAtoms(mask=slab.get_tags() == 3))
    settings = Settings(fmax=1e-3, max_steps=N_STEPS)
    results = relax(model, [held, slab, benzene()], settings)
    for atoms, relaxed in zip((held, slab, benzene()), results, strict=True):
        assert_same(relaxed, by_ase(model, atoms, settings))
    assert (results[1].cell == slab.cell.array).all()
    assert (results[1].positions[:1] == slab.positions[:1]).all()
    # held atoms keep their place in the cell
    fractions = results[0].positions @ np.linalg.inv(results[0].cell)
    np.testing.assert_allclose(fractions[[0, 3]], held.get_scaled_positions(wrap=False)[[0, 3]], atol=1e-12)
    assert np.abs(results[0].forces[[0, 3]]).max() > 1e-3


def test_each_mode_keeps_what_it_says(model) -> None:
    (start,) = crystals()[1:2]

    def strain(cell: str) -> np.ndarray:
        (relaxed,) = relax(model, [start], Settings(fmax=1e-3, max_steps=5, cell=cell))
        return np.linalg.solve(start.cell.array, relaxed.cell).T - np.eye(3)

    exact = 1e-12  # rounding
    change = strain("hydrostatic")
    np.testing.assert_allclose(change, change[0, 0] * np.eye(3), atol=exact)
    assert abs(change[0, 0]) > 1e-4
    change = strain("constant-volume")
    assert np.linalg.det(change + np.eye(3)) == pytest.approx(1, abs=exact)
    assert np.abs(change).max() > 1e-4
    change = strain("xx,yz")
    np.testing.assert_allclose(change[[1, 2, 0, 0, 1, 2], [1, 2, 1, 2, 0, 0]], 0, atol=exact)
    assert min(abs(change[0, 0]), abs(change[1, 2])) > 1e-5
    np.testing.assert_allclose(strain("fixed"), 0, atol=exact)


def test_pressure_compresses(trained) -> None:
    settings = (Settings(pressure=pressure) for pressure in (0.0, 0.1))
    none, some = (relax(trained, [bulk("Fe")], one)[0] for one in settings)
    assert none.converged
    assert some.volume_change < none.volume_change - 0.01
    # what is left of the force on the cell is fmax, less than this in each component
    np.testing.assert_allclose(some.stress, -0.1 * np.eye(3), atol=0.05 / some.final.volume)


def small() -> list[Atoms]:
    return [rattled(bulk(symbol, cubic=cubic), seed=seed) for seed, (symbol, cubic) in enumerate(CASES)]


CASES = [("Fe", True), ("Cu", False), ("Si", False), ("Al", True), ("W", False), ("Mg", False)]


def test_batches_do_not_matter(model) -> None:
    structures = small()
    settings = Settings(fmax=0.05, max_steps=14)
    alone = [relax(model, [atoms], settings)[0] for atoms in structures]
    assert len({one.n_steps for one in alone}) > 2  # they leave at different times
    assert {one.converged for one in alone} == {True, False}
    for batch_size in (2, None):
        order = []
        for one in relax_each(model, structures, settings, batch_size):
            order.append(one.index)
            single = alone[one.index]
            assert (one.n_steps, one.reason) == (single.n_steps, single.reason)
            np.testing.assert_allclose(one.energies, single.energies, **CLOSE)
            np.testing.assert_allclose(one.positions, single.positions, **CLOSE)
        assert sorted(order) == list(range(len(structures)))


def test_the_batch_is_bounded(model, monkeypatch) -> None:
    systems = systems_from_atoms(small())
    held = [np.zeros(n, bool) for n in systems.n_atoms]
    sizes = []
    evaluate = relax_module.MovingSystems.evaluate

    def watched(moving, position, cell) -> Output:
        sizes.append(moving.systems.n_systems)
        return evaluate(moving, position, cell)

    monkeypatch.setattr(relax_module.MovingSystems, "evaluate", watched)
    for room, most in ((Room(1e12, 3), 3), (Room(1e12), 6), (Room(1.0), 1)):
        sizes.clear()
        relaxation = Relaxation(model, systems, held, Settings(max_steps=1), room)
        while not relaxation.finished:
            relaxation.step()
        assert max(sizes) == most


def test_short_memory_halves_the_batch(model, monkeypatch) -> None:
    structures = small()
    settings = Settings(fmax=0.01, max_steps=6)
    expected = relax(model, structures, settings)
    evaluate = relax_module.MovingSystems.evaluate
    sizes = []

    def short_of_memory(moving, position, cell) -> Output:
        sizes.append(moving.systems.n_systems)
        if len(sizes) > 2 and moving.systems.n_systems > 3:
            raise torch.OutOfMemoryError
        return evaluate(moving, position, cell)

    monkeypatch.setattr(relax_module.MovingSystems, "evaluate", short_of_memory)
    for one, other in zip(relax(model, structures, settings), expected, strict=True):
        np.testing.assert_allclose(one.energies, other.energies, **CLOSE)
    assert sizes[:4] == [6, 6, 6, 3]
    monkeypatch.setattr(relax_module.MovingSystems, "evaluate", never_enough)
    assert [one.reason for one in relax(model, structures[:2])] == [
        "it does not fit in the memory of the device"
    ] * 2


def never_enough(moving, position, cell) -> Output:
    raise torch.OutOfMemoryError


@pytest.mark.parametrize("flaw", ["nan", "overlap"])
def test_one_failure_leaves_the_others_alone(model, monkeypatch, flaw) -> None:
    structures = small()
    settings = Settings(fmax=0.01, max_steps=6)
    expected = relax(model, structures, settings)
    evaluate = relax_module.MovingSystems.evaluate
    calls = itertools.count()

    def broken(moving, position, cell) -> Output:
        """Break the second crystal of the first batch in the fourth evaluation."""
        number = next(calls)
        first = moving.systems.n_atoms[0]
        if number == 3 and flaw == "overlap":
            position = position.clone()
            position[first] = position[first] + torch.nan
        output = evaluate(moving, position, cell)
        if number == 3:
            output.forces[first] = torch.nan
        return output

    monkeypatch.setattr(relax_module.MovingSystems, "evaluate", broken)
    results = relax(model, structures, settings, batch_size=4)
    assert [one.failed for one in results] == [False, True, False, False, False, False]
    assert (
        results[1].reason
        == {
            "nan": "the model's prediction is not finite",
            "overlap": "positions contain NaN or infinity",
        }[flaw]
    )
    # the last good frame, and what was computed of it
    np.testing.assert_allclose(results[1].energies, expected[1].energies[:3], **CLOSE)
    assert results[1].energy == results[1].energies[-1]
    (again,) = relax(model, [results[1].as_atoms()], Settings(max_steps=0))
    np.testing.assert_allclose(again.forces, results[1].forces, **CLOSE)
    for one, other in zip(results[2:] + results[:1], expected[2:] + expected[:1], strict=True):
        np.testing.assert_allclose(one.energies, other.energies, **CLOSE)


def test_a_crystal_of_which_nothing_is_known_stays_as_it_was(model, monkeypatch) -> None:
    evaluate = relax_module.MovingSystems.evaluate

    def silent(moving, position, cell) -> Output:
        output = evaluate(moving, position, cell)
        return output._replace(energy=output.energy * torch.nan)

    monkeypatch.setattr(relax_module.MovingSystems, "evaluate", silent)
    (one,) = relax(model, [bulk("Cu")])
    assert one.failed and one.n_steps == 0 and len(one.energies) == 0
    assert np.isnan(one.energy) and np.isnan(one.fmax) and np.isnan(one.forces).all()
    assert one.as_atoms() == bulk("Cu") and one.as_atoms().calc is None


@pytest.mark.parametrize("pressure", [-1.0, 3.0])
def test_a_cell_that_explodes_or_collapses_is_stopped(model, pressure) -> None:
    settings = Settings(fmax=1e-9, max_steps=100, pressure=pressure)
    (burst,) = relax(model, [bulk("Cu")], settings)
    assert burst.failed and burst.reason.endswith("times its volume at the start")
    assert np.isfinite(burst.forces).all() and len(burst.energies) < 50
    assert (burst.volume_change > 0) == (pressure < 0)


def test_direct_models_relax_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="no derivatives") as caught:
        results = relax(
            potential(SMALL.model_copy(update={"readout": "direct"})), crystals(), Settings(max_steps=1)
        )
    assert len(caught) == 1
    assert [one.n_steps for one in results] == [1] * 4


def test_what_is_asked_for_must_make_sense(model) -> None:
    for settings in (
        {"fmax": 0},
        {"fmax": np.nan},
        {"max_steps": -1},
        {"pressure": np.inf},
        {"cell": "xx,zx"},
    ):
        with pytest.raises(InputError):
            Settings(**settings)
    slab = bulk("Cu")
    slab.set_constraint(FixedPlane(0, (0, 0, 1)))
    with pytest.raises(InputError, match=r"structure 1: .*FixedPlane"):
        relax(model, [bulk("Cu"), slab])
    with pytest.raises(InputError, match="neither ase Atoms"):
        relax(model, [3])
    assert relax(model, []) == []


def test_pymatgen_structures_and_their_selective_dynamics(model) -> None:
    pytest.importorskip("pymatgen.core")
    from pymatgen.io.ase import AseAtomsAdaptor

    atoms = crystals()[0]
    structure = AseAtomsAdaptor.get_structure(atoms)
    structure.add_site_property("selective_dynamics", [[False] * 3, [True] * 3])
    atoms.set_constraint(FixAtoms([0]))
    settings = Settings(max_steps=4, cell="fixed")
    ours, same = relax(model, [structure, atoms], settings)
    np.testing.assert_allclose(ours.positions, same.positions, atol=1e-9)
    np.testing.assert_allclose(ours.positions[0], atoms.positions[0], atol=1e-9)
    structure.add_site_property("selective_dynamics", [[False, True, True], [True] * 3])
    with pytest.raises(InputError, match="some directions"):
        relax(model, [structure])


def test_the_logarithm_inverts_the_exponential() -> None:
    generator = torch.Generator().manual_seed(0)
    logarithm = 0.3 * torch.randn(20, 3, 3, dtype=torch.float64, generator=generator)
    logarithm[0] = torch.tensor([[0, 0.5, 0], [0, 0, 0.5], [0, 0, 0]])  # has no eigenvectors
    logarithm[1] = torch.diag(torch.tensor([-0.7, 0.7, 0.0]))
    found = log_matrix(torch.linalg.matrix_exp(logarithm))
    torch.testing.assert_close(found, logarithm, rtol=0, atol=1e-13)  # rounding


def test_components_are_read_in_any_order() -> None:
    assert CellMode.of("xy,xx").components == ("xx", "xy")
    assert CellMode.of("fixed").free().sum() == 0
    assert CellMode.of("yz").free().nonzero().tolist() == [[1, 2], [2, 1]]


def test_room_knows_what_is_free(model) -> None:
    assert 0 < free_memory(torch.device("cpu")) < 2**50
    room = Room.of(model, 5)
    assert room.fits(5, 1.0) and not room.fits(6, 1.0)
    assert room.fits(1, 1e30) and not room.fits(2, 1e30)
    sizes = np.array([[1, 10, 2, 20], [2, 20, 4, 40]])
    needed = needed_bytes(sizes, torch.float32)
    assert needed[1] == 2 * needed[0] > 0
