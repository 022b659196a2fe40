"""One of the processes that `bench scaling` times; torchrun starts them, on a folder of frames."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
from pathlib import Path

from fastchgnet.bench import timing
from fastchgnet.bench.steps import open_trainer
from fastchgnet.errors import ToldElsewhere
from fastchgnet.files import write_atomically
from fastchgnet.train.ranks import joined
from fastchgnet.train.setup import reproducible

N_WARM = {"cpu": 1, "cuda": 4}
"""Steps before those that are timed: connections are opened, kernels get compiled, graphs recorded."""


def main(folder: Path) -> None:
    """Time steps of training on all frames of a folder, and write what they took beside them."""
    asked = json.loads((folder / "asked.json").read_text())
    # whatever happens to the launcher, this process ends
    faulthandler.dump_traceback_later(asked["limit"], exit=True)
    try:
        _time(folder, asked)
    except ToldElsewhere:
        sys.exit(2)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        text = f"rank {os.environ['RANK']}: {type(error).__name__}: {reason}"
        write_atomically(folder / f"failed-{os.environ['RANK']}", text)
        sys.exit(2)


def _time(folder: Path, asked: dict) -> None:
    with joined(asked["device"], asked["limit"], threading.Event()) as (ranks, device), reproducible(device):
        trainer = open_trainer(folder, asked["readout"], device, ranks)
        trainer.align()
        (batch,) = trainer.batches.epoch(0)
        n_warm = N_WARM[device.type]
        with contextlib.closing(trainer.take_step):
            taken = [
                timing.sample(lambda work=work: trainer.step(work), 1, device)  # type: ignore[misc]
                for work in trainer.load([batch] * (n_warm + asked["rounds"]))
            ]
            trainer.check()
        wall, cpu = zip(*taken[n_warm:], strict=True)
        found = ranks.gather({"wall": wall, "cpu": cpu})
        if ranks.first:
            write_atomically(folder / "found.json", json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
