"""The C++ bodies of CPU ops: compiled once for the machine at hand, kept in the user's cache.

Where there is no C++ compiler the PyTorch bodies serve, a few times slower; FASTCHGNET_NATIVE=0 asks for
them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastchgnet.files import cache_folder

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
_TUNING = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler takes
_ROWS_PER_THREAD = 256
"""What a thread that is awake is worth; the first few operations of a sequence wake it."""

_ROWS_PER_NEW_THREAD = 2048
"""About a millisecond's work: on a virtual machine a core that sleeps takes a quarter of that to wake."""

logger = logging.getLogger(__name__)
_shares_threads = False  # with PyTorch
_enabled = os.environ.get("FASTCHGNET_NATIVE", "1") != "0"


@contextmanager
def disabled() -> Iterator[None]:
    """Use the PyTorch bodies inside, for tests and comparisons."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def library() -> ctypes.CDLL | None:
    """Return the compiled bodies, or None where they are switched off or cannot be had."""
    return _load() if _enabled else None


def n_threads(n_rows: int) -> int:
    """Return how many threads so many rows are worth."""
    least = _ROWS_PER_THREAD if _shares_threads else _ROWS_PER_NEW_THREAD
    return max(1, min(torch.get_num_threads(), n_rows // least))


def block(tensors: Iterable[Tensor | None], numbers: Iterable[int] = ()) -> ctypes.c_void_p:
    """Put addresses of contiguous tensors, zero for what is missing, and then numbers into a struct."""
    words = array("q", [0 if tensor is None else tensor.data_ptr() for tensor in tensors])
    words.extend(numbers)
    given = ctypes.c_void_p(words.buffer_info()[0])
    given.words = words  # type: ignore[attr-defined]  # they live as long as their address
    return given


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a contiguous tensor's values."""
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _load() -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        logger.info("no C++ compiler found: CPU ops run as PyTorch, a few times slower")
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
        _share_threads(library)
        return library
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        line = next(iter(reason.strip().splitlines()), type(error).__name__)
        logger.warning("CPU ops run as PyTorch, a few times slower: %s failed (%s)", compiler, line)
        return None


def _share_threads(library: ctypes.CDLL) -> None:
    """Let the bodies run on PyTorch's threads where those are OpenMP's."""
    global _shares_threads
    if os.name != "posix":
        return
    runtime = ctypes.CDLL(None)  # what PyTorch has loaded for everybody
    try:
        functions = runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.omp_get_num_threads
    except AttributeError:
        return
    library.use_pool(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))
    _shares_threads = True


def _compiled(compiler: str) -> Path:
    """Compile the sources, unless the cache has them for this compiler and processor."""
    path = cache_folder() / f"ops-{_fingerprint(compiler)}.so"
    if path.exists():
        return path
    logger.info("compiling CPU ops, once for this machine")
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside, then renamed: other processes find all of it or nothing
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "ops.so"
        for tuning in _TUNING:
            command = [compiler, *_FLAGS, *tuning, "-o", str(made), *map(str, _sources(".cpp"))]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=tuning == ())
            if done.returncode == 0:
                break
        made.replace(path)
    return path


def _fingerprint(compiler: str) -> str:
    """Hash what the compiled file depends on; one cache may serve several machines."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True)
    parts = [version.stdout, platform.machine(), torch.backends.cpu.get_cpu_capability(), _processor()]
    parts += [source.read_text() for source in (*_sources(".cpp"), *_sources(".h"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _sources(suffix: str) -> list[Path]:
    return sorted(_FOLDER.glob(f"*{suffix}"))


def _processor() -> str:
    """Describe the processor by its features, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
