"""Compile the kernels of training steps and evaluations for a GPU that is not here, into Triton's cache.

TRITON_CACHE_DIR=cache python benchmarks/compile_kernels.py FRAMES.xyz [16 64 ...]

They take some minutes on one core. The folder serves on a machine with the same source tree, the same Triton
and a GPU of the compute capability below, where TRITON_CACHE_DIR names it. Batches are as `fastchgnet bench`
takes them from the file. Tensors are on the meta device, which has shapes and no numbers.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastchgnet.bench.frames import ATOM_CUTOFF, BOND_CUTOFF, Pool
from fastchgnet.bench.steps import write_frames
from fastchgnet.config import RunConfig
from fastchgnet.data.store import Store
from fastchgnet.ops.gpu import runtime
from fastchgnet.train.batches import Division
from fastchgnet.train.optim import Optimizer
from fastchgnet.train.resident import ResidentFrames
from fastchgnet.train.rooms import frame_sizes
from fastchgnet.train.setup import Frames, blank_potential
from fastchgnet.train.source import DeviceGraphs, Planning
from fastchgnet.train.step import Inputs, Step

H100 = GPUTarget("cuda", 90, 32)
N_MULTIPROCESSORS = 132
CPU, META = torch.device("cpu"), torch.device("meta")


class Absent:
    """Stands for the driver of a GPU that is not here."""

    def get_current_target(self) -> GPUTarget:
        return H100

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class BodiesForGpus(TorchDispatchMode):
    """Calls the bodies that ops have for GPUs."""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op.namespace != "fastchgnet" or not op.has_kernel_for_dispatch_key(DispatchKey.CUDA):
            return op(*args, **(kwargs or {}))
        with self:
            return op._op_dk(DispatchKey.CUDA, *args, **(kwargs or {}))


def take_step(pool: Pool, n_frames: int, readout: str, folder: Path) -> None:
    """Take a step on the first frames of the pool; in single precision, evaluate them, too."""
    write_frames(pool.workload(n_frames).frames, folder)
    store = Store(folder / "store")
    frames, batch = Frames(store, np.arange(n_frames)), np.arange(n_frames)
    values = {
        "model": {"readout": readout},
        "data": {"train": folder / "store"},
        "train": {"out": folder / "run"},
    }
    config = RunConfig.model_validate(values)
    first = blank_potential(config, frames, CPU)
    sizes = frame_sizes(store, frames.indices, ATOM_CUTOFF, BOND_CUTOFF)
    planning, resident = Planning(sizes, [batch], Division(sizes)), ResidentFrames(store, META)
    source = DeviceGraphs(frames, first, planning, resident)
    room = source.room([batch])
    tensors = [t.to(META) for t in source.prepare(batch, room)]
    potential = copy.deepcopy(first).to(META).train()
    average = copy.deepcopy(potential)
    optimizer = Optimizer(potential.in_order(), average.in_order(), config.optim.clip_norm)
    inputs = Inputs(*(torch.zeros(shape, dtype=torch.float64, device=META) for shape in ((3, 4), 3, 8)))
    with BodiesForGpus():
        made = DeviceGraphs(frames, potential, planning, resident).make(tensors, room)
        Step(potential, optimizer, config.loss)([made], inputs)
        if runtime.current_precision() == "fp32":
            with torch.no_grad():
                average.eval()(made.batch)


def set_up(launch: Callable[..., Any]) -> None:
    """Let bodies for GPUs go as far as their launches, which another function takes over."""
    driver.set_active(Absent())
    runtime.launch = launch
    runtime.serves = lambda tensor: True
    runtime._n_multiprocessors = lambda device: N_MULTIPROCESSORS  # type: ignore[assignment]


def main(file: str, *batches: str) -> None:
    """Compile for both readouts and both precisions."""
    set_up(lambda kernel, grid, device, *args, **options: kernel.warmup(*args, grid=(grid,), **options))
    pool = Pool(Path(file), 0)
    for readout in ("conservative", "direct"):
        for precision in ("tf32", "fp32"):
            runtime.current_precision = lambda chosen=precision: chosen  # type: ignore[misc]
            for n_frames in map(int, batches or ("16", "64")):
                start = time.perf_counter()
                with tempfile.TemporaryDirectory() as folder:
                    take_step(pool, n_frames, readout, Path(folder))
                print(
                    f"{readout}, {precision}, {n_frames} frames: {time.perf_counter() - start:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main(*sys.argv[1:])
