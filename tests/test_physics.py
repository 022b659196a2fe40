"""What any potential must obey, in fp64: symmetry, derivatives, locality and smoothness."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from crystals import CONSERVATIVE, OLD, PAIR, PAPER, SMOOTH, benzene, crystals, potential, run
from scipy.spatial.transform import Rotation

from fastchgnet.config import ModelConfig
from fastchgnet.graph import Output
from fastchgnet.neighbors import build_graph, systems_from_atoms

ALL = {"conservative": CONSERVATIVE, "pair": PAIR, "paper": PAPER, "smooth": SMOOTH, "0.2.0-like": OLD}
EXACT = {"rtol": 1e-9, "atol": 1e-10}  # fp64 rounding over sums of a few thousand terms of order one

each = pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())
equivariant_stress = pytest.mark.parametrize(
    "config", [c for c in ALL.values() if c is not PAPER], ids=[n for n in ALL if n != "paper"]
)


def split(output: Output, atoms: list[Atoms]) -> list[Output]:
    """Cut a batch's output into its systems."""
    sizes = [len(a) for a in atoms]
    forces, magmoms, sites = (
        torch.split(t, sizes) for t in (output.forces, output.magmoms, output.site_energies)
    )
    return [
        Output(output.energy[s], forces[s], output.stress[s], magmoms[s], sites[s]) for s in range(len(atoms))
    ]


@each
def test_batch_equals_single(config: ModelConfig) -> None:
    model, atoms = potential(config), [*crystals(), benzene()]
    for together, one in zip(split(run(model, *atoms), atoms), atoms, strict=True):
        alone = run(model, one)
        torch.testing.assert_close(together, split(alone, [one])[0], equal_nan=True, **EXACT)


@equivariant_stress
def test_rotation(config: ModelConfig) -> None:
    model, atoms = potential(config), crystals()[1]
    turn = Rotation.random(random_state=0).as_matrix()
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ turn.T, scale_atoms=False)
    turned.positions = atoms.positions @ turn.T
    before, after = run(model, atoms), run(model, turned)
    q = torch.from_numpy(turn)
    torch.testing.assert_close(after.energy, before.energy, **EXACT)
    torch.testing.assert_close(after.forces, before.forces @ q.T, **EXACT)
    torch.testing.assert_close(after.stress[0], q @ before.stress[0] @ q.T, **EXACT)
    torch.testing.assert_close(after.magmoms, before.magmoms, **EXACT)


@each
def test_translation_and_permutation(config: ModelConfig) -> None:
    model, atoms = potential(config), crystals()[1]
    order = np.array([3, 0, 4, 2, 1])
    moved = atoms[order]
    moved.positions += [1.3, -20.7, 4.4]
    before, after = run(model, atoms), run(model, moved)
    torch.testing.assert_close(after.energy, before.energy, **EXACT)
    torch.testing.assert_close(after.forces, before.forces[order], **EXACT)
    torch.testing.assert_close(after.stress, before.stress, **EXACT)
    torch.testing.assert_close(after.magmoms, before.magmoms[order], **EXACT)


@each
def test_supercell(config: ModelConfig) -> None:
    model, atoms = potential(config), crystals()[2]
    before, after = run(model, atoms), run(model, atoms.repeat((2, 1, 2)))
    torch.testing.assert_close(after.energy, 4 * before.energy, **EXACT)
    torch.testing.assert_close(after.forces, before.forces.repeat(4, 1), **EXACT)
    torch.testing.assert_close(after.stress, before.stress, **EXACT)


@equivariant_stress
def test_equivalent_choice_of_cell(config: ModelConfig) -> None:
    model, atoms = potential(config), crystals()[1]
    other = atoms.copy()
    other.set_cell(np.array([[1, 0, 0], [2, 1, 0], [-1, 1, 1]]) @ atoms.cell.array, scale_atoms=False)
    other.positions += atoms.cell.array[[0, 1, 2, 0, 1]]
    torch.testing.assert_close(run(model, other), run(model, atoms), **EXACT)


@equivariant_stress
def test_left_handed_cell_has_the_same_stress(config: ModelConfig) -> None:
    model, atoms = potential(config), crystals()[1]
    other = atoms.copy()
    other.set_cell(atoms.cell.array[[1, 0, 2]], scale_atoms=False)
    torch.testing.assert_close(run(model, other).stress, run(model, atoms).stress, **EXACT)


CONSERVATIVE_ONES = {name: config for name, config in ALL.items() if config.readout == "conservative"}


@pytest.mark.parametrize("config", CONSERVATIVE_ONES.values(), ids=CONSERVATIVE_ONES.keys())
@pytest.mark.parametrize("which", range(4))
def test_forces_and_stress_are_derivatives_of_the_energy(config: ModelConfig, which: int) -> None:
    """Central differences; step 3e-5 A errs by about 100 step^2, rounding by 1e-15 / step."""
    model, atoms, step = potential(config), crystals()[which], 3e-5
    output = run(model, atoms)
    rng = np.random.default_rng(which)
    move = rng.normal(size=atoms.positions.shape)
    strain = rng.normal(size=(3, 3))
    strain = (strain + strain.T) / 2

    def energy(shift: float, stretch: float) -> float:
        moved = atoms.copy()
        moved.positions += shift * move
        moved.set_cell(moved.cell.array @ (np.eye(3) + stretch * strain), scale_atoms=True)
        return run(model, moved).energy.item()

    slope = (energy(step, 0) - energy(-step, 0)) / (2 * step)
    assert slope == pytest.approx(-(output.forces.numpy() * move).sum(), rel=1e-5, abs=1e-6)
    slope = (energy(0, step) - energy(0, -step)) / (2 * step)
    virial = (output.stress[0].numpy() * strain).sum() * abs(np.linalg.det(atoms.cell.array))
    assert slope == pytest.approx(virial, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "config", [CONSERVATIVE, PAIR, SMOOTH, OLD], ids=["conservative", "pair", "smooth", "old"]
)
def test_third_law(config: ModelConfig) -> None:
    output = run(potential(config), crystals()[1])
    assert output.forces.sum(0).abs().max() < 1e-12 * output.forces.abs().sum()
    torch.testing.assert_close(output.stress, output.stress.mT, **EXACT)


@each
def test_no_gradient_leaks_between_crystals(config: ModelConfig) -> None:
    model, atoms = potential(config), crystals()
    batch = build_graph(systems_from_atoms(atoms), 6.0, 3.0)
    vector = batch.bond_vector.clone().requires_grad_()
    features = model.model(batch, vector)
    own = features.site_energy[batch.atom_system == 1].sum() + features.magmoms[batch.atom_system == 1].sum()
    (gradient,) = torch.autograd.grad(own, vector)
    assert gradient[batch.bond_system == 1].abs().max() > 0
    assert gradient[batch.bond_system != 1].abs().max() == 0


def dimer(distance: float) -> Atoms:
    return Atoms("LiO", positions=[[0, 0, 0], [distance, 0, 0]])


def test_pairs_vanish_smoothly_at_the_atom_cutoff() -> None:
    """The envelope falls as the cube of the distance left: half the distance, an eighth or less."""
    model = potential(CONSERVATIVE)
    with pytest.warns(UserWarning, match="no neighbour"):
        free = run(model, dimer(6.0001)).energy.item()
    near, far = (run(model, dimer(6 - gap)).energy.item() - free for gap in (0.02, 0.04))
    assert near != 0
    assert far / near > 7.5


@pytest.mark.parametrize("config", [CONSERVATIVE, SMOOTH], ids=["fourier", "chebyshev"])
def test_angles_vanish_smoothly_at_the_bond_cutoff(config: ModelConfig) -> None:
    """Count the longest bond among the short ones or not: the difference falls as a cube, too."""
    model = potential(config)

    def difference(gap: float) -> float:
        atoms = Atoms("OLiF", positions=[[0, 0, 0], [1.9, 0, 0], [0.4, 3 - gap, 0.2]])
        gap_vector = atoms.positions[2] / np.linalg.norm(atoms.positions[2])
        atoms.positions[2] = (3 - gap) * gap_vector
        systems = systems_from_atoms([atoms])
        with_bond, without = (model(build_graph(systems, 6.0, 3 - cut)).energy.item() for cut in (0, 2 * gap))
        return with_bond - without

    near, far = difference(0.01), difference(0.02)
    assert near != 0
    assert far / near > 7.5


@each
def test_pairs_beyond_the_cutoffs_change_nothing(config: ModelConfig) -> None:
    """Skin edges contribute exactly zero; an output bias alone asks which bonds are really short."""
    model, atoms = potential(config), crystals()[1]
    systems = systems_from_atoms([atoms])
    exact = run(model, atoms)
    bond_skin = 0.0 if config.output_bias else 0.4
    skin = model(build_graph(systems, config.atom_cutoff + 0.7, config.bond_cutoff + bond_skin))
    torch.testing.assert_close(skin, exact, **EXACT)


@each
def test_no_periodicity_no_stress(config: ModelConfig) -> None:
    model = potential(config)
    slab = crystals()[1]
    slab.pbc = [True, True, False]
    slab.center(vacuum=6.0, axis=2)
    output = run(model, slab, benzene(), crystals()[0])
    assert output.stress[:2].isnan().all()
    assert output.stress[2].isfinite().all()
    assert output.forces.isfinite().all()
    model.train()
    output = run(model, slab, crystals()[0])
    loss = output.stress.nan_to_num(0).square().sum() + output.forces.square().sum() + output.energy.sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@each
def test_atoms_without_neighbours_or_angles(config: ModelConfig) -> None:
    model = potential(config)
    lone = Atoms("Cs", cell=[20, 20, 20], pbc=True)
    pair = Atoms("H2", positions=[[0, 0, 0], [0.8, 0, 0]], cell=[20, 20, 20], pbc=True)
    with pytest.warns(UserWarning, match="no neighbour"):
        alone = run(model, lone)
    assert alone.energy.isfinite().all()
    assert alone.forces.abs().max() == 0
    if config is not PAPER:
        assert alone.stress.abs().max() == 0
    with pytest.warns(UserWarning, match="no neighbour"):
        together = split(run(model, lone, pair, crystals()[0]), [lone, pair, crystals()[0]])
    torch.testing.assert_close(together[0].energy, alone.energy[0], **EXACT)
    torch.testing.assert_close(together[1].energy, run(model, pair).energy[0], **EXACT)


EMPTY = {
    "no bonds": Atoms("Cs", cell=[20, 20, 20], pbc=True),
    "no short bonds": Atoms("NaCl", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[4.2] * 3, pbc=True),
    "no long bonds": molecule("H2O"),
    "no angles": molecule("N2"),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("what", EMPTY)
@pytest.mark.parametrize("config", [CONSERVATIVE, PAIR, OLD], ids=["conservative", "pair", "0.2.0-like"])
def test_gradients_of_what_lacks_something_add_up(
    config: ModelConfig, what: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, other = potential(config, dtype).train(), crystals()[0]

    def gradient(*atoms: Atoms) -> torch.Tensor:
        output = run(model, *atoms)
        loss = output.energy.sum() + output.forces.square().sum() + output.magmoms.square().sum()
        found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        return torch.cat([t.flatten() for t in found])

    no_neighbour = pytest.warns(UserWarning, match="no neighbour") if what == "no bonds" else nullcontext()
    with no_neighbour:
        alone, together = gradient(EMPTY[what]), gradient(EMPTY[what], other)
    assert alone.any()
    torch.testing.assert_close(
        together, alone + gradient(other), rtol=0, atol=tolerance * float(together.abs().max())
    )


def test_evaluation_is_detached_and_training_is_not() -> None:
    for config in (CONSERVATIVE, PAIR):
        model, atoms = potential(config), crystals()[0]
        with torch.no_grad():
            assert not any(t.requires_grad for t in run(model, atoms))
        assert not any(t.requires_grad for t in run(model, atoms))
        assert all(t.requires_grad for t in run(model.train(), atoms))


@pytest.mark.parametrize(
    "config", [CONSERVATIVE, PAIR, PAPER, SMOOTH], ids=["fourier", "pair", "paper", "smooth"]
)
def test_parameter_gradient_of_all_targets(config: ModelConfig) -> None:
    """The gradient of a loss on energy, forces, stress and magmoms against central differences."""
    model = potential(config).train()
    batch = build_graph(systems_from_atoms(crystals()[:2]), 6.0, 3.0)

    def loss() -> torch.Tensor:
        output = model(batch)
        terms = (output.energy / 10, output.forces, 10 * output.stress, output.magmoms)
        return torch.stack([(t + 0.3 * t.sin()).square().sum() for t in terms]).sum()

    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss(), parameters)
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    step, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * step)
        values.append(loss().item())
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=-sign * step)
    slope = (values[0] - values[1]) / (2 * step)
    along = sum((g * d).sum().item() for g, d in zip(gradient, direction, strict=True))
    assert slope == pytest.approx(along, rel=1e-5)
