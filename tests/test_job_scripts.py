"""The job scripts of the examples run, stop and queue again, with stand-ins for what SLURM has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
from test_ranks import folder, losses, straight, wait_for_states, write  # noqa: F401, fixtures

from fastchgnet.train.checkpoint import load_state

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="SLURM is for POSIX")]


def submit(script: str, config: Path, tools: Path) -> subprocess.Popen:
    """Start a script as on one node with two GPUs; what it asks of the scheduler is written to a file."""
    tools.mkdir(exist_ok=True)
    asked = tools / "asked"
    stubs = {
        "srun": '#!/usr/bin/env bash\nexec "$@"\n',
        "scontrol": f'#!/usr/bin/env bash\n[[ $1 == show ]] && echo localhost || echo "$@" >> {asked}\n',
        "torchrun": f'#!/usr/bin/env bash\nexec {sys.executable} -m torch.distributed.run "$@"\n',
    }
    for name, text in stubs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    given = {"CPUS_PER_TASK": 2, "GPUS_ON_NODE": 2, "JOB_ID": 7, "JOB_NUM_NODES": 1, "JOB_NODELIST": "n1"}
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in given.items()}
    return subprocess.Popen(
        ["bash", str(EXAMPLES / script), str(config)],
        env=environment | {"PATH": f"{tools}:{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("script", ["slurm-one-node.sh", "slurm-several-nodes.sh"])
def test_a_job_that_is_stopped_queues_again_and_goes_on(
    script: str,
    folder: Path,  # noqa: F811
    straight: list[float],  # noqa: F811
    tmp_path: Path,
) -> None:
    out, tools = tmp_path / "run", tmp_path / "tools"
    config = write(folder, out, train={"checkpoint_minutes": 1e-6})
    job = submit(script, config, tools)
    wait_for_states(out)
    job.send_signal(signal.SIGTERM)  # as --signal=B:TERM does
    _, text = job.communicate(timeout=ranks.SECONDS)
    assert job.returncode == 0 and (tools / "asked").read_text() == "requeue 7\n", text
    assert "--resume continues" in text
    state = load_state(out / "state")
    assert state is not None and 0 < state[1].step < 12
    (tools / "asked").unlink()

    again = submit(script, config, tools)
    _, text = again.communicate(timeout=ranks.SECONDS)
    assert again.returncode == 0 and not (tools / "asked").exists(), text
    assert losses(out) == pytest.approx(straight, rel=1e-8)


def test_a_job_that_fails_does_not_queue_again(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    config = write(folder, tmp_path / "run", data={"train": str(tmp_path / "nothing")})
    job = submit("slurm-one-node.sh", config, tmp_path / "tools")
    _, text = job.communicate(timeout=ranks.SECONDS)
    assert job.returncode == 1 and "no store here" in text and not (tmp_path / "tools" / "asked").exists()
