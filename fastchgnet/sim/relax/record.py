"""The record of a command that relaxes files: what is finished stays finished, whatever ends the process.

For `relaxed.extxyz` these are, in the same folder,

    relaxed.jsonl           one line for each finished relaxation: what it was and what came of it
    .relaxed.extxyz.part    their crystals, while the command runs
    relaxed.extxyz          all crystals in the order of the input, written when the command ends

A relaxation is finished when both its crystal and, after it, its line have been written. A crystal without a
line, a line without a crystal and what a killed process has written in part do not count.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from ase import Atoms

from fastchgnet.errors import InputError
from fastchgnet.files import lock, write_atomically
from fastchgnet.sim.outputs import one_line, remove_parts

Key = tuple[str, int]
"""File, and number of the frame in it."""

Row = dict[str, Any]


def lines_path(out: Path) -> Path:
    """Return where the lines of the crystals in `out` are."""
    return out.with_suffix(".jsonl")


class Record:
    """The finished relaxations of a command; use as a context.

    Args:
        out: the .extxyz file.
        settings: what a relaxation depends on, but for the crystal.
        starts: what tells the crystals at the start apart.

    Raises:
        InputError: the record is of other settings or crystals, cannot be read or written, or another process
            is writing it.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], starts: Mapping[Key, str]) -> None:
        self.out, self.lines = out, lines_path(out)
        self._part = out.with_name(f".{out.name}.part")
        self._lock_path = out.with_name(f".{out.name}.lock")
        self._settings = dict(settings)
        self.rows: dict[Key, Row] = {}
        self._blocks: dict[Key, str] = {}
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock_path.open("ab")
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
        if not lock(self._lock):
            self._lock.close()
            raise InputError(f"{out}: another process is writing it")
        for path in (self.out, self.lines, self._part):
            remove_parts(path)
        try:
            self._resume(starts)
        except BaseException:
            self._close()
            raise

    def _resume(self, starts: Mapping[Key, str]) -> None:
        """Read what is finished, and begin anew with nothing else."""
        rows = {(row["file"], row["index"]): row for row in self._read_lines()}
        for row in rows.values():
            self._compare(row, starts)
        self._refuse_others({row["crystal"] for row in rows.values()})
        if rows:
            blocks = {_digest(block): block for path in (self.out, self._part) for block in _blocks(path)}
            self.rows = {key: row for key, row in rows.items() if row["crystal"] in blocks}
            self._blocks = {key: blocks[row["crystal"]] for key, row in self.rows.items()}
        write_atomically(self._part, "".join(self._blocks.values()))
        self._write_lines()
        self._part_file: IO[str] = self._part.open("a", encoding="utf-8")
        self._line_file: IO[str] = self.lines.open("a", encoding="utf-8")

    def _read_lines(self) -> list[Row]:
        """Read the lines; the last one does not count where it has no end."""
        try:
            text = self.lines.read_text(encoding="utf-8") if self.lines.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.lines}: cannot be read ({error})") from error
        rows = []
        for number, line in enumerate(text.splitlines(keepends=True), start=1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not _is_row(row):
                raise InputError(f"{self.lines}: line {number} is not of a relaxation; name another --out")
            rows.append(row)
        return rows

    def _compare(self, row: Row, starts: Mapping[Key, str]) -> None:
        """Refuse to go on where that would mix what does not belong together."""
        before = row["settings"]
        for name, value in self._settings.items():
            if before.get(name) != value:
                found = f"was made with {name} {before.get(name)}, not {value}"
                raise InputError(f"{self.lines}: {found}; name another --out, or remove both files")
        key = (row["file"], row["index"])
        if starts.get(key, row["start"]) != row["start"]:
            raise InputError(f"{key[0]}:{key[1]} has changed since it was relaxed into {self.out}")

    def _refuse_others(self, digests: set[str]) -> None:
        """Refuse to replace anything but crystals that have a line."""
        if not self.out.exists():
            return
        blocks = list(_blocks(self.out))
        is_whole = sum(len(block.encode()) for block in blocks) == self.out.stat().st_size
        if not (is_whole and digests.issuperset(map(_digest, blocks))):
            raise InputError(
                f"{self.out}: exists already and holds what {self.lines} does not name; "
                "name another --out or remove it"
            )

    def add(self, key: Key, row: Row, atoms: Atoms) -> None:
        """Write a finished relaxation.

        Args:
            key: which crystal.
            row: what came of it, in JSON; `crystal` and `settings` are added.
            atoms: the crystal.

        Raises:
            InputError: the disk does not take it.
        """
        atoms.info = {"file": one_line(key[0]), "index": key[1], **atoms.info}
        block = to_extxyz([atoms])
        row = {**row, "crystal": _digest(block), "settings": self._settings}
        try:
            for file, text in ((self._part_file, block), (self._line_file, _line(row))):
                file.write(text)
                file.flush()
        except OSError as error:
            raise InputError(f"{self.out}: cannot be written ({error.strerror or error})") from error
        self.rows[key], self._blocks[key] = row, block

    def crystal(self, key: Key) -> Atoms:
        """Return a finished crystal."""
        from ase.io.extxyz import read_extxyz

        return next(read_extxyz(io.StringIO(self._blocks[key])))

    def finish(self, order: Iterable[Key]) -> None:
        """Write the crystals and lines in this order, then those of other inputs; the files are whole."""
        keys = [key for key in dict.fromkeys([*order, *self.rows]) if key in self.rows]
        self.rows = {key: self.rows[key] for key in keys}
        # no crystal is there without its line at any time
        self._line_file.close()
        self._write_lines()
        write_atomically(self.out, "".join(self._blocks[key] for key in keys))
        self._part_file.close()
        self._part.unlink(missing_ok=True)

    def _write_lines(self) -> None:
        write_atomically(self.lines, "".join(map(_line, self.rows.values())))

    def _close(self) -> None:
        self._lock_path.unlink(missing_ok=True)
        self._lock.close()

    def __enter__(self) -> Self:
        """Return the open record."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        for file in (self._part_file, self._line_file):
            with contextlib.suppress(OSError):  # what the disk did not take before, it does not now
                file.close()
        self._close()


def to_extxyz(frames: Iterable[Atoms]) -> str:
    """Write crystals as ASE reads them."""
    from ase.io import write

    buffer = io.StringIO()
    write(buffer, list(frames), format="extxyz")
    return buffer.getvalue()


def _is_row(value: Any) -> bool:
    """Tell whether this is what `Record.add` writes."""
    kinds = {"file": str, "index": int, "start": str, "crystal": str, "settings": dict, "failed": bool}
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _digest(block: str) -> str:
    return hashlib.sha256(block.encode()).hexdigest()[:16]


def _blocks(path: Path) -> Iterator[str]:
    """Yield the text of the whole frames at the beginning of a file, if there is one."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        while (head := file.readline()).strip().isdecimal():
            block = [head, *(file.readline() for _ in range(int(head) + 1))]
            if not block[-1].endswith("\n"):
                return
            yield "".join(block)
