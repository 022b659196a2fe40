"""The trainer's step where tensors have shapes and no numbers: nothing of it is on the host, or waits for it.

With the bodies for GPUs it goes as far as the launches: what kernels are given lies on one device, too.
"""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import interpreted  # noqa: F401, first: Triton decides at its import whether it interprets
import pytest
import torch
from on_meta import OnOneDevice, assert_not_on_host
from test_step import CPU, batches_of, everything, planning_for
from test_train import configure, emt_frames
from torch._C import DispatchKey
from torch.utils._pytree import tree_leaves

from fastchgnet.bench.frames import Pool
from fastchgnet.config import Provenance
from fastchgnet.data.store import Store, write_store
from fastchgnet.ops.gpu import runtime
from fastchgnet.train.optim import Optimizer
from fastchgnet.train.resident import ResidentFrames
from fastchgnet.train.setup import blank_potential
from fastchgnet.train.source import DeviceGraphs
from fastchgnet.train.step import Inputs, Step


class BodiesForGpus(OnOneDevice):
    """Calls the bodies that ops have for GPUs, in place of what tells the shapes."""

    def apply(self, op: Any, args: tuple, kwargs: dict) -> Any:
        if op.namespace != "fastchgnet" or not op.has_kernel_for_dispatch_key(DispatchKey.CUDA):
            return op(*args, **kwargs)
        with self:
            found = op._op_dk(DispatchKey.CUDA, *args, **kwargs)
        for one, other in zip(tree_leaves(found), tree_leaves(op(*args, **kwargs)), strict=True):
            # empty stands for what there is not, or for what nobody asked for
            assert one.dtype == other.dtype and (one.shape == other.shape or (0,) in (one.shape, other.shape))
        return found


def take_step(folder: Path, readout: str, choice: str, dtype: str, mode: OnOneDevice) -> None:
    """From the numbers of frames to the new weights; on the meta device what needs a value fails."""
    write_store(emt_frames(20, 0), folder / "train", Provenance(name="emt"))
    model = {"readout": readout, "readout_hidden": (64, 64)}
    config = configure(folder, folder / "run", model=model, train={"dtype": dtype})
    frames = everything(Store(folder / "train"))
    first = blank_potential(config, frames, CPU)
    planning, batch = planning_for(frames, batches_of(config)), batches_of(config)[0]
    resident = ResidentFrames(frames.store, torch.device("meta")) if choice == "resident" else None
    source = DeviceGraphs(frames, first, planning, resident)
    room = source.room([batch])
    tensors = [t.to("meta") for t in source.prepare(batch, room)]
    potential = copy.deepcopy(first).to("meta").train()
    source = DeviceGraphs(frames, potential, planning, resident)
    optimizer = Optimizer(potential.in_order(), copy.deepcopy(potential).in_order(), clip_norm=1.0)
    step = Step(potential, optimizer, config.loss)
    inputs = Inputs(*(torch.zeros(shape, dtype=torch.float64, device="meta") for shape in ((3, 4), 3, 8)))
    with mode:
        assert step([source.make(tensors, room)], inputs).shape == (8,)


@pytest.mark.parametrize("readout", ["conservative", "direct"])
@pytest.mark.parametrize("choice", ["resident", "sent"])
def test_the_host_sees_nothing_of_a_step(tmp_path: Path, readout: str, choice: str) -> None:
    take_step(tmp_path, readout, choice, "float64", OnOneDevice())


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of modules whose kernels would be launched."""
    names: set[str] = set()

    def launch(kernel: Any, grid: int, device: torch.device, *args: Any, **options: Any) -> None:
        assert grid > 0 and device.type == "meta"
        assert_not_on_host((args, options), kernel)
        names.add(kernel.fn.__module__.split(".")[-1])

    monkeypatch.setattr(runtime, "launch", launch)
    monkeypatch.setattr(runtime, "serves", lambda tensor: True)
    return names


@pytest.mark.parametrize("readout", ["conservative", "direct"])
@pytest.mark.parametrize("choice", ["resident", "sent"])
def test_kernels_of_a_step_are_given_tensors_of_their_device(
    tmp_path: Path, readout: str, choice: str, launched: set[str]
) -> None:
    take_step(tmp_path, readout, choice, "float32", BodiesForGpus())
    used = {
        *("adam", "angular_basis", "bond_tables", "geometry", "huber", "magmom", "message", "neighbors"),
        *("neighbors_pad", "pair_forces", "projection", "readout", "segments"),
    }
    if readout == "direct":
        used.add("central_pulls")
    assert used | ({"frames"} if choice == "resident" else set()) <= launched


@pytest.mark.parametrize("readout", ["conservative", "direct"])
def test_the_script_that_compiles_kernels_takes_a_step(
    tmp_path: Path, readout: str, launched: set[str]
) -> None:
    root = Path(__file__).parents[1]
    script = runpy.run_path(str(root / "benchmarks" / "compile_kernels.py"))
    script["take_step"](Pool(root / "examples" / "prototypes.xyz", 0), 1, readout, tmp_path)
    assert {"adam", "bond_tables", "frames", "message"} <= launched
