"""What feeding a training step costs: frames from a store, graphs from frames."""

from __future__ import annotations

from fastchgnet.bench import ours, reference
from fastchgnet.bench.frames import Workload
from fastchgnet.bench.rows import Row
from fastchgnet.bench.session import Session

NOTE = (
    "`gather` reads the frames of a batch from a store on disk that has been read before, `ours` builds "
    "their graphs on the device, `step` trains on them; chgnet converts them from pymatgen Structures, on "
    "the CPU and once per frame, ours in every step."
)


def row(session: Session, workload: Workload, readout: str) -> Row:
    """Time feeding a step, and the step."""
    found = session.row("data", workload, readout, NOTE)
    with ours.training(workload, readout, session.device) as training:
        arms = {"gather": training.gather, "ours": training.build, "step": training.step}
        if session.options.chgnet:
            arms["chgnet"] = reference.conversion(workload)
        session.time(found, arms)
    for part in ("gather", "ours"):
        found[part]["fraction_of_step"] = found[part]["wall_seconds"][1] / found["step"]["wall_seconds"][1]
    return found
