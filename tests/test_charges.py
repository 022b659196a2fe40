"""Oxidation states against chgnet's."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from ase.io import read
from chgnet.utils.vasp_utils import solve_charge_by_mag
from crystals import crystals
from pymatgen.core import Element, Structure

from fastchgnet.errors import InputError
from fastchgnet.sim.charges import DEFAULT_CHARGES, ChargeTable, read_charge_table

EXAMPLES = Path(__file__).parents[1] / "examples" / "prototypes.xyz"


def chgnets(structure: Structure, magmoms: np.ndarray, table: ChargeTable) -> list[float] | None:
    structure = structure.copy()
    structure.add_site_property("magmom", magmoms.tolist())
    ranges = {symbol: {row[:2]: row[2] for row in rows} for symbol, rows in table.ranges.items()}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solved = solve_charge_by_mag(structure, table.fixed, ranges)
    return None if solved is None else [site.specie.oxi_state for site in solved]


def test_states_are_chgnets_for_any_moments() -> None:
    """Manganese oxides of the example set and their supercells, with moments all over and on the borders."""
    rng = np.random.default_rng(0)
    some = [atoms for atoms in read(EXAMPLES, ":") if 25 in atoms.numbers][:6]
    assert len(some) == 6
    borders = np.array([0.5, 1.5, 2.5, 3.5, 4.2, 4.999])
    n_solved = 0
    for atoms in some:
        structure = Structure(atoms.cell.array, atoms.numbers, atoms.positions, coords_are_cartesian=True)
        for magmoms in (
            rng.uniform(0.3, 5.2, len(atoms)),
            rng.choice(borders, len(atoms)),
            np.full(len(atoms), 0.1),
        ):
            expected = chgnets(structure, magmoms, DEFAULT_CHARGES)
            found = DEFAULT_CHARGES.assign(atoms.numbers, magmoms)
            assert (found is None) == (expected is None)
            if found is not None:
                n_solved += 1
                assert found.tolist() == expected
    assert n_solved >= 3


def test_the_first_of_overlapping_ranges_counts() -> None:
    table = ChargeTable(fixed={"O": -2}, ranges={"Fe": ((3.0, 4.0, 2), (3.5, 4.5, 3))})
    assert table.assign([26, 26, 26, 8], [3.2, 3.7, 4.2, 0.0]).tolist() == [2, 2, 3, -2]
    assert table.assign([26, 8], [4.6, 0.0]) is None


def test_default_states_are_the_only_common_ones() -> None:
    for symbol, state in DEFAULT_CHARGES.fixed.items():
        assert Element(symbol).common_oxidation_states == (state,)


def test_elements_without_states_are_named() -> None:
    iron = crystals()[3]
    assert DEFAULT_CHARGES.assign(iron.numbers, [2.2] * len(iron)) is None
    with pytest.raises(InputError, match="no oxidation states are known for Fe, Ti; give a table"):
        DEFAULT_CHARGES.check([8, 22, 26])


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "table.yaml"
    path.write_text("fixed: {Mn: 4, Ti: 4}\nranges: {Fe: [[3.0, 3.9, 2], [3.9, 4.6, 3]]}\n")
    table = read_charge_table(path)
    assert table.assign([25, 22, 26, 26, 3, 8], [0, 0, 3.5, 4.1, 0, 0]).tolist() == [4, 4, 2, 3, 1, -2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fixed: [1, 2]", "not a table of charges: fixed"),
        ("ranges: {Fe: [[1, 2]]}", "not a table of charges: ranges.Fe.0"),
        ("- 1", "not a table of charges"),
        ("{", "not a table of charges"),
        ("", "not a table of charges"),
        ("fixed: {Xx: 1}", "no element is called Xx"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "table.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        read_charge_table(path)
    assert "\n" not in str(raised.value)
