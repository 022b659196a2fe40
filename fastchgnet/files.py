"""Files that are whole or not there, and written by one process at a time."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from fastchgnet.errors import InputError


def cache_folder() -> Path:
    """Return the folder of what can be made anew: FASTCHGNET_CACHE, else one in the user's cache."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTCHGNET_CACHE") or Path(user_cache) / "fastchgnet")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` beside `path`, and rename it to `path` once it is safely on the disk.

    Raises:
        InputError: the folder or the disk does not take it; `path` is as before.
    """
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(_part_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def _part_name(name: str) -> str:
    # its own for every writer: several processes may write the same file at once
    return f".{name}.{uuid.uuid4().hex}.part"


def check_new(path: Path) -> None:
    """Look before any work whether a file can be made under this name without replacing another.

    Raises:
        InputError: the folder does not take it, or there is one.
    """
    check_writable(path)
    refuse_existing([path])


def refuse_existing(paths: Iterable[Path]) -> None:
    """Raise InputError for the first of these files or folders that exists."""
    for path in paths:
        if os.path.lexists(path):
            raise InputError(f"{path}: exists already; choose another name or remove it")


def check_writable(path: Path) -> None:
    """Look before any work whether a file can be written under this name; folders above it are not made.

    Raises:
        InputError: it is a folder, or the one that it would be in takes no such file.
    """
    if os.path.isdir(path):
        raise InputError(f"{path}: cannot be written (it is a folder)")
    _probe(path, path.absolute().parent, path.name)


def check_folder(folder: Path) -> None:
    """Look before any work whether files can be written into a folder, which is not made.

    Raises:
        InputError: it is no folder, or takes no files, or cannot be made.
    """
    _probe(folder, folder.absolute(), "file")


def _probe(path: Path, folder: Path, name: str) -> None:
    """Write what `write_atomically` writes first, in `folder` or the first above it that exists."""
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    probe = existing / _part_name(name)
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where the system can open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed or the process ends; False where another process has locked it."""
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # some file systems of clusters know no locks
    return True


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder.

    Raises:
        InputError: another process is in it.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    with file:
        if not lock(file):
            raise InputError(f"{folder}: another process is writing here")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
