"""Published weights: ours against chgnet run in float64, one structure at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import chain

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.units import GPa
from conftest import shared_data
from reference import Chgnet, Reference, chgnet_modules
from torch import Tensor

from fastchgnet.graph import Output
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.potential import Potential
from fastchgnet.published import PUBLISHED, load, to_our_layout

# eV/atom, eV/A, GPa, mu_B. In float64 only rounding is left.
FLOAT64 = np.array([1e-7, 1e-6, 1e-5, 1e-6])
# In float32, rounding of ~1e-7 through some twenty layers; chgnet's own error is up to 3e-4 eV/A.
FLOAT32 = np.array([1e-5, 1e-4, 1e-3, 1e-4])
FLOAT32_OF_FORCE = 2e-5

MPTRJ_LIKE_ISOLATED = 650  # the frame of mptrj_like with atoms without neighbours within 6 A

names = pytest.mark.parametrize("name", PUBLISHED)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Import the weights with the code under test, not with what wrote the user's cache."""
    chgnet_modules()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTCHGNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def crystals() -> list[Atoms]:
    """Give 200 crystals of every size, isolated atoms included, and 100 hot or compressed ones."""
    by_size = ase.io.read(shared_data() / "structures" / "mptrj_like_2487.xyz", index=":")
    isolated = by_size.pop(MPTRJ_LIKE_ISOLATED)
    by_size.sort(key=len)
    spread = [by_size[i] for i in np.linspace(0, len(by_size) - 1, 199).astype(int)]
    hot: dict[str, list[Atoms]] = {"random_TP": [], "mptrj_highstress": [], "mpf_TP": []}
    for atoms in ase.io.iread(shared_data() / "dft" / "val.xyz"):
        hot.get(atoms.info["config_type"], []).append(atoms)
    return [isolated, *spread, *chain(*hot.values())][:300]


@pytest.fixture(scope="module")
def sample(crystals: list[Atoms]) -> list[Atoms]:
    """Give a few small crystals of each kind."""
    return [crystals[0], *crystals[1:200:12][:4], *sorted(crystals[200:], key=len)[:4]]


def compute(potential: Potential, crystals: Sequence[Atoms]) -> Output:
    """Run ours on one batch."""
    with warnings.catch_warnings():
        # isolated atoms are there on purpose
        warnings.simplefilter("ignore", UserWarning)
        return potential(potential.build_graph(systems_from_atoms(crystals)))


def split(output: Output, crystals: Sequence[Atoms]) -> list[Reference]:
    """Cut the answer for a batch into crystals."""
    n_atoms = [len(atoms) for atoms in crystals]
    per_atom = (output.forces, output.magmoms, output.site_energies)
    forces, magmoms, site_energies = (tensor.split(n_atoms) for tensor in per_atom)
    return [
        Reference(*one)
        for one in zip(output.energy, forces, output.stress, magmoms, site_energies, strict=True)
    ]


def in_batches(potential: Potential, crystals: Sequence[Atoms], n_batch: int = 16) -> list[Reference]:
    """Run ours on crystals of all kinds mixed in each batch, and answer in the order given."""
    answers: list[Reference | None] = [None] * len(crystals)
    order = np.random.default_rng(0).permutation(len(crystals))
    for start in range(0, len(crystals), n_batch):
        chosen = order[start : start + n_batch]
        batch = [crystals[i] for i in chosen]
        for i, answer in zip(chosen, split(compute(potential, batch), batch), strict=True):
            answers[i] = answer
    return answers  # type: ignore[return-value]


def detached(reference: Reference) -> Reference:
    return Reference(*(tensor.detach() for tensor in reference))


def errors(found: Sequence[Reference], expected: Sequence[Reference]) -> np.ndarray:
    """Largest error of each crystal, [n, 4]: eV/atom and of any atom's energy, eV/A, GPa, mu_B."""
    rows = []
    for ours, theirs in zip(found, expected, strict=True):
        difference = [(a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs, strict=True)]
        energy, forces, stress, magmoms, site_energies = difference
        rows.append([max(energy / len(theirs.forces), site_energies), forces, stress / GPa, magmoms])
    return np.array(rows)


def check_parity(name: str, crystals: Sequence[Atoms]) -> dict[str, np.ndarray]:
    """Compare both precisions with chgnet in float64; return the errors of all, [n, 4] each."""
    exact, single = Chgnet(name, torch.float64), Chgnet(name, torch.float32)
    expected = [detached(exact(atoms)) for atoms in crystals]
    found = {
        "ours fp64": errors(in_batches(load(name, dtype="float64"), crystals), expected),
        "ours fp32": errors(in_batches(load(name), crystals), expected),
        "chgnet fp32": errors([detached(single(atoms)) for atoms in crystals], expected),
    }
    allowed = np.tile(FLOAT32, (len(crystals), 1))
    allowed[:, 1] += FLOAT32_OF_FORCE * np.array([answer.forces.norm(dim=1).max() for answer in expected])
    np.testing.assert_array_less(found["ours fp64"], np.tile(FLOAT64, (len(crystals), 1)))
    np.testing.assert_array_less(found["ours fp32"], np.maximum(allowed, found["chgnet fp32"]))
    return found


@names
def test_a_few_crystals(name: str, sample: list[Atoms]) -> None:
    check_parity(name, sample)


@pytest.mark.slow
@names
def test_300_crystals(name: str, crystals: list[Atoms]) -> None:
    assert len(crystals) == 300
    assert {2, 248} <= {len(atoms) for atoms in crystals[:200]}
    check_parity(name, crystals)


@names
def test_batch_equals_single(name: str, sample: list[Atoms]) -> None:
    """The output bias of 0.2.0 must shift bonds only in crystals that have an angle themselves."""
    loose = Atoms("NaCl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[4.2, 4.2, 4.2], pbc=True)
    batch = [loose, *sample]
    potential = load(name, dtype="float64")
    alone = [split(compute(potential, [atoms]), [atoms])[0] for atoms in batch]
    # sums over atoms in another order
    assert errors(split(compute(potential, batch), batch), alone).max() < 1e-11
    assert errors(alone[:1], [Chgnet(name, torch.float64)(loose)]).max() < FLOAT64.min()


@names
def test_isolated_atom(name: str) -> None:
    caesium = Atoms("Cs", cell=[30, 30, 30], pbc=True)
    potential = load(name, dtype="float64")
    with pytest.warns(UserWarning, match="no neighbour") as caught:
        output = potential(potential.build_graph(systems_from_atoms([caesium])))
    assert len(caught) == 1
    assert errors(split(output, [caesium]), [Chgnet(name, torch.float64)(caesium)]).max() < FLOAT64.min()


def test_left_handed_cell(sample: list[Atoms]) -> None:
    """Two lattice vectors exchanged are the same crystal, and have the same stress."""
    right = sample[-1]
    left = Atoms(right.symbols, right.positions, cell=right.cell.array[[1, 0, 2]], pbc=True)
    assert np.linalg.det(left.cell) < 0 < np.linalg.det(right.cell)
    potential = load("chgnet-0.3.0", dtype="float64")
    ours = split(compute(potential, [left]), [left])
    assert (errors(ours, [Chgnet("chgnet-0.3.0", torch.float64)(left)]) < FLOAT64).all()
    assert (errors(ours, split(compute(potential, [right]), [right])) < FLOAT64).all()


def loss(answers: Sequence[Reference], targets: Sequence[Reference]) -> Tensor:
    """Mean squares of eV/atom, eV/A, GPa and mu_B, summed over crystals."""
    total = torch.zeros((), dtype=torch.float64)
    for answer, target in zip(answers, targets, strict=True):
        energy = (answer.energy - target.energy) / len(target.forces)
        stress = (answer.stress - target.stress) / GPa
        forces, magmoms = answer.forces - target.forces, answer.magmoms - target.magmoms
        total = total + sum((d.double() ** 2).mean() for d in (energy, forces, stress, magmoms))
    return total


def labels(answers: Sequence[Reference]) -> list[Reference]:
    """Labels about as far from the model as DFT is, in every quantity, with the crystal's symmetry.

    Symmetry matters: labels without it ask for a gradient that a symmetric crystal cancels to nothing.
    """
    return [
        Reference(
            energy=answer.energy.detach() + 0.03 * len(answer.forces),
            forces=0.9 * answer.forces.detach(),
            stress=0.9 * answer.stress.detach() + 0.5 * GPa * torch.eye(3, dtype=answer.stress.dtype),
            magmoms=answer.magmoms.detach() + 0.03,
            site_energies=answer.site_energies.detach(),
        )
        for answer in answers
    ]


def gradients(
    potential: Potential, crystals: Sequence[Atoms], targets: Sequence[Reference]
) -> dict[str, Tensor]:
    """Differentiate the loss of one batch with respect to every parameter of our model."""
    potential.train().zero_grad()
    loss(split(compute(potential, crystals), crystals), targets).backward()
    return {name: p.grad.double() for name, p in potential.model.named_parameters()}


@names
def test_parameter_gradients(name: str, sample: list[Atoms]) -> None:
    reference = Chgnet(name, torch.float64)
    answers = [reference(atoms) for atoms in sample]
    targets = labels(answers)
    loss(answers, targets).backward()
    theirs = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in reference.model.named_parameters()
        if not name.startswith("composition_model")
    }
    expected = to_our_layout(theirs)
    found = gradients(load(name, dtype="float64"), sample, targets)
    assert found.keys() == expected.keys()
    for tensor, gradient in expected.items():
        assert gradient.norm() > 0, tensor
        assert (found[tensor] - gradient).norm() < 1e-6 * gradient.norm(), tensor

    single = gradients(load(name), sample, targets)
    error = sum((single[tensor] - gradient).square().sum() for tensor, gradient in expected.items()).sqrt()
    # second derivatives in float32; the whole gradient, since small tensors are differences of large terms
    assert error < 2e-3 * sum(gradient.square().sum() for gradient in expected.values()).sqrt()
