"""What ASE would read wrongly, without a word, in a frame of an extended-XYZ file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

_EMPTY = re.compile(r"""(?:^|(?<=\s))[^\s="']+=(?:""|''|\[\]|\{\})?(?=\s+[A-Za-z_]\w*=)""")
"""A key without a value, before another key."""


def without_empty_values(line: str) -> str:
    """Drop keys without a value, as ASE writes empty text: its reader takes the next key for the value."""
    return _EMPTY.sub("", line)


def malformed(header: Mapping[str, object], block: Sequence[str], keys: Iterable[str]) -> str | None:
    """Say what is wrong with a frame.

    Args:
        header: The second line as ASE parsed it.
        block: The lines of the frame; the first is its number of atoms.
        keys: Where labels stand.
    """
    for key in filter(None, ("Lattice", "Properties", "pbc", *keys)):
        if key not in header and re.search(rf"(?:^|\s){re.escape(key)}\s*=", block[1]):
            return f"{key} is no key of its own in the header; is a quote missing?"
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
