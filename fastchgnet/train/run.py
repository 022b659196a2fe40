"""A run from its configuration to its end: by one process, or by several that torchrun has started."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from fastchgnet import __version__
from fastchgnet.config import RunConfig, load_run_config
from fastchgnet.device import own_settings
from fastchgnet.errors import InputError
from fastchgnet.files import only_process, refuse_existing, write_atomically
from fastchgnet.train.checkpoint import Progress, load_state
from fastchgnet.train.launcher import is_restarted
from fastchgnet.train.log import RunLog, read_metrics
from fastchgnet.train.loop import State, Trainer, Watcher, shared
from fastchgnet.train.ranks import Ranks, joined
from fastchgnet.train.setup import Frames, open_frames, reproducible, resolve
from fastchgnet.train.signals import stop_request

_HOW = {
    "train": {"out", "device", "capture", "checkpoint_minutes", "timeout_minutes"},
    "data": {"resident", "accumulate"},
}
"""Settings that a resumed run may change: how it is run, not what."""

_WHERE = {"train": {"out", "init"}, "data": {"train", "val"}}
"""Settings in which processes may differ: machines have paths of their own; what is there is compared."""


@dataclass(frozen=True, slots=True)
class Summary:
    """How a call of `train` ended."""

    folder: Path
    finished: bool  # False where it was asked to stop; the run can be resumed
    progress: Progress
    last: dict | None  # metrics of the last finished epoch

    def as_dict(self) -> dict:
        """Describe it as JSON takes it."""
        position = dataclasses.asdict(self.progress)
        return {"folder": str(self.folder), "finished": self.finished, **position, "last": self.last}


@own_settings
@torch.enable_grad()
def train(config: RunConfig, resume: bool = False, watcher: Watcher | None = None) -> Summary:
    """Train a potential as `config` says and keep everything in the folder `config.train.out`.

    Ctrl-C or SIGTERM ends it between two steps with everything saved. On the CPU a resumed run gives
    the same numbers, bit for bit, as one that was never interrupted by as many processes. Under torchrun all
    processes call this; the first one writes and is watched, and one that torchrun has restarted resumes.

    Args:
        config: the run.
        resume: continue the run in the folder, or start it where there is none yet.
        watcher: told what happens.

    Raises:
        InputError: bad data, weights or device; a folder that holds another run, or a run without
            `resume`; a loss that is not a number, naming the frames; processes that differ, end or hang.
    """
    timeout = 60 * config.train.timeout_minutes
    resume = resume or is_restarted()
    with stop_request() as stop, joined(config.train.device, timeout, stop) as (ranks, device):
        with ranks.together():
            config = resolve(config)
            frames = open_frames(config.data)
        ranks.agree(_facts(config, frames))
        with reproducible(device), _alone_in(config.train.out, ranks):
            with ranks.together():
                state = _find_state(config, resume) if ranks.first else None
            (found, *_) = ranks.gather(state and shared(state))
            state = state if ranks.first else found
            with ranks.together():
                trainer = Trainer(config, *frames, device, state, ranks)
            # machines may round differently where frames are measured
            ranks.agree({"what training frames are counted to need": trainer.progress.frames})
            trainer.align()
            if state is None:
                trainer.save_state()
                _write_config(config, ranks)
            with (
                contextlib.closing(trainer.take_step),
                _log(config.train.out, trainer.progress.epoch, ranks) as log,
            ):
                finished = trainer.run(stop, log, (watcher if ranks.first else None) or Watcher())
    rows = read_metrics(config.train.out) if ranks.first else []
    return Summary(config.train.out, finished, trainer.progress, rows[-1] if rows else None)


def _find_state(config: RunConfig, resume: bool) -> State | None:
    """Load the state of the run in the folder, having made sure that it is this run."""
    folder = config.train.out
    if not (folder / "config.yaml").exists():
        leftover = load_state(folder / "state")
        if leftover is not None and leftover[1].step > 0:
            raise InputError(f"{folder}: holds states but no config.yaml; choose another train.out")
        refuse_existing(folder / name for name in ("best.safetensors", "last.safetensors", "metrics.jsonl"))
        return None
    if not resume:
        raise InputError(f"{folder}: already holds a run; --resume continues it, or choose another train.out")
    before, now = (
        c.model_dump(mode="json", exclude=_HOW) for c in (load_run_config(folder / "config.yaml"), config)
    )
    changed = [f"{part}.{key}" for part in now for key in now[part] if now[part][key] != before[part][key]]
    if changed:
        raise InputError(f"{folder}: cannot resume, the run there has another {', '.join(changed)}")
    state = load_state(folder / "state")
    if state is None:
        raise InputError(f"{folder}: holds a run whose state is missing; choose another train.out")
    return state


def _facts(config: RunConfig, frames: tuple[Frames, Frames]) -> dict[str, str]:
    """What must be the same in all processes."""
    train, val = frames
    facts = {
        "the version of fastchgnet": __version__,
        "the version of torch": torch.__version__,
        "the training frames": train.fingerprint(),
        "the validation frames": val.fingerprint(),
    }
    for part, section in config.model_dump(mode="json", exclude=_WHERE).items():
        facts |= {f"{part}.{key}": str(value) for key, value in section.items()}
    return facts


@contextlib.contextmanager
def _alone_in(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Keep processes of other runs out of the folder, which the first process uses for all.

    What was there before may be read only inside: until then another process may still be writing.
    """
    with contextlib.ExitStack() as stack:
        with ranks.together():
            if ranks.first:
                stack.enter_context(only_process(folder))
                for unfinished in (*folder.glob(".*.part"), *(folder / "state").glob(".*.part")):
                    unfinished.unlink(missing_ok=True)  # of a process that was killed
        yield


def _write_config(config: RunConfig, ranks: Ranks) -> None:
    with ranks.together():
        if ranks.first:
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            write_atomically(config.train.out / "config.yaml", text)


@contextlib.contextmanager
def _log(folder: Path, epoch: int, ranks: Ranks) -> Iterator[RunLog | None]:
    """Open the record of the run in the first process."""
    with contextlib.ExitStack() as stack:
        with ranks.together():
            log = stack.enter_context(RunLog(folder, epoch)) if ranks.first else None
        yield log
