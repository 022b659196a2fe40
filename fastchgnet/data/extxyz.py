"""What is wrong with a frame of an extended-XYZ file that ASE would read without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def malformed(header: Mapping[str, object], block: Sequence[str]) -> str | None:
    """Say what is wrong with the lines of a frame, the first its number of atoms, the second its header."""
    pbc = np.asarray(header.get("pbc", True))
    if pbc.dtype.kind not in "bi" or pbc.shape not in ((), (3,)):
        return f"pbc is {header['pbc']}, expected T or F for each of three axes"
    if not isinstance(properties := header.get("Properties"), str):
        return None  # a plain xyz file
    fields = properties.split(":")
    if "pos" not in fields[::3]:
        return f"no positions: Properties is {properties}"
    n_columns = sum(map(int, fields[2::3]))
    for line in block[2:]:
        if len(line.split()) != n_columns:
            return f"expected {n_columns} columns, as Properties says, found {line.strip()[:80]!r}"
    if not block[-1].endswith("\n"):
        return "the last line has no end, so that its last number may be cut; end it if the file is whole"
    return None
