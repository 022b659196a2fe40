"""Where simulations write: names that ASE reads again, and nothing of the user's in their place."""

from __future__ import annotations

import glob
import io
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from fastchgnet.errors import InputError
from fastchgnet.files import check_writable, refuse_existing
from fastchgnet.markup import is_page

if TYPE_CHECKING:
    from ase import Atoms

_OTHER_FORMATS = re.compile("POSCAR|CONTCAR|CENTCAR|OUTCAR|XDATCAR|CONFIG")
"""ASE takes a file with one of these in its name for another format, whatever its suffix."""


def plain_name(text: str) -> str:
    """Give a part of a file's name that file systems take, and ASE for no other format."""
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "_", text)[:60]
    return _OTHER_FORMATS.sub(lambda found: found.group().lower(), plain)


def one_line(text: str) -> str:
    """Give a file's name as a comment of an .extxyz file can hold it: a line of printable characters."""
    return "".join(letter if letter.isprintable() else "_" for letter in text)


def number_or_none(value: float) -> float | None:
    """Give a number as JSON takes it, which lacks NaN."""
    return float(value) if math.isfinite(value) else None


def remove_parts(path: Path) -> None:
    """Remove what killed processes have left of `write_atomically`; only for who has locked `path`."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 32}.part"):
        part.unlink(missing_ok=True)


def read_frames(path: Path, indices: Iterable[int]) -> Iterator[Atoms]:
    """Yield some frames of an .extxyz file of ours, given in ascending order; the others are passed over."""
    from ase.io.extxyz import read_extxyz

    with path.open(encoding="utf-8") as file:
        number = 0
        for index in indices:
            for passed in range(number, index + 1):
                if not (head := file.readline()):
                    return
                body = islice(file, int(head) + 1)
                if passed < index:
                    deque(body, maxlen=0)
            yield next(read_extxyz(io.StringIO(head + "".join(body))))
            number = index + 1


def check_report(path: Path | None, goes_on: bool) -> None:
    """Look before a long run whether its page can be written.

    Args:
        path: of the page, if one is asked for.
        goes_on: whether the run was begun before, so that its page may be there.

    Raises:
        InputError: it has another suffix, or something that is not the page of this run is there, or its
            folder does not take it.
    """
    if path is None:
        return
    if path.suffix not in (".html", ".htm"):
        raise InputError(f"{path}: pages are written as .html")
    check_writable(path)
    if not (goes_on and path.is_file() and is_page(path)):
        refuse_existing([path])
