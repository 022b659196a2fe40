"""Oxidation states from magnetic moments, as chgnet's `solve_charge_by_mag` assigns them.

An element either has one oxidation state, or one for each range of its magnetic moment, low <= moment < high,
of which the first that holds it counts. The charges of a crystal are those of all its atoms, or none where
one atom has no state; they need not add up to zero, which is for the reader to judge.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import yaml
from ase.data import chemical_symbols
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError

from fastchgnet.config import Config
from fastchgnet.errors import InputError


class ChargeTable(Config):
    """Which oxidation states elements have."""

    fixed: dict[str, float]  # by symbol
    ranges: dict[str, tuple[tuple[float, float, float], ...]]  # low, high (mu_B) and state, by symbol

    def check(self, numbers: Iterable[int]) -> None:
        """Raise InputError where elements are not in the table."""
        symbols = {chemical_symbols[number] for number in numbers}
        if unknown := sorted(symbols - set(self.fixed) - set(self.ranges)):
            raise InputError(
                f"charges: no oxidation states are known for {', '.join(unknown)}; give a table that has them"
            )

    def assign(self, numbers: ArrayLike, magmoms: ArrayLike) -> NDArray[np.float64] | None:
        """Return the oxidation state of each of n atoms, or None where one atom has none.

        Args:
            numbers: atomic numbers, [n].
            magmoms: magnitudes of the magnetic moments, mu_B, [n].
        """
        numbers, magmoms = np.asarray(numbers), np.asarray(magmoms)
        states = np.full(len(numbers), np.nan)
        for number in np.unique(numbers):
            symbol, atoms = chemical_symbols[number], numbers == number
            if symbol in self.ranges:
                moments = magmoms[atoms]
                found = np.full(len(moments), np.nan)
                for low, high, state in reversed(self.ranges[symbol]):
                    found[(low <= moments) & (moments < high)] = state
                states[atoms] = found
            elif symbol in self.fixed:
                states[atoms] = self.fixed[symbol]
        return None if np.isnan(states).any() else states


_STATES = {
    1: "Li Na K Rb Cs",
    2: "Be Mg Ca Sr Ba Zn Cd",
    3: "Al Sc Y La Lu Ga In",
    4: "Zr Hf",
    5: "Ta",
    -1: "F",
    -2: "O",
}

DEFAULT_CHARGES = ChargeTable(
    fixed={symbol: state for state, symbols in _STATES.items() for symbol in symbols.split()},
    ranges={"Mn": ((0.5, 1.5, 2), (1.5, 2.5, 3), (2.5, 3.5, 4), (3.5, 4.2, 3), (4.2, 5.0, 2))},
)
"""Li, O and the ranges of Mn are chgnet's (low- and high-spin Mn2+, Mn3+, Mn4+ in oxides, Deng et al. 2023);
the other elements have this one common oxidation state and no other (pymatgen's periodic table)."""


def read_charge_table(path: Path) -> ChargeTable:
    """Read a YAML file with `fixed: {Li: 1}` and `ranges: {Fe: [[3.0, 3.9, 2], [3.9, 4.6, 3]]}`.

    Elements it does not name keep their states of `DEFAULT_CHARGES`.

    Raises:
        InputError: no such file, or not a table.
    """
    try:
        read = ChargeTable.model_validate(
            {"fixed": {}, "ranges": {}} | yaml.safe_load(path.read_text(encoding="utf-8"))
        )
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: not a table of charges: {where}: {first['msg']}") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError):
        raise InputError(f"{path}: not a table of charges") from None
    if unknown := sorted((set(read.fixed) | set(read.ranges)) - set(chemical_symbols[1:])):
        raise InputError(f"{path}: no element is called {unknown[0]}")
    kept = {symbol: rows for symbol, rows in DEFAULT_CHARGES.ranges.items() if symbol not in read.fixed}
    return ChargeTable(fixed=DEFAULT_CHARGES.fixed | read.fixed, ranges=kept | read.ranges)
