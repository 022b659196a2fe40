"""One optimiser step of our trainer against one of chgnet's."""

from __future__ import annotations

from fastchgnet.bench import memory, ours, reference
from fastchgnet.bench.frames import Workload
from fastchgnet.bench.profile import profiled
from fastchgnet.bench.rows import Row
from fastchgnet.bench.session import Session

NOTE = (
    "One step of each package's own trainer on one batch: forward, loss, backward, Adam. On a CPU graphs are "
    "built beforehand for both, since chgnet's trainer keeps them, and ours_with_graphs gathers the frames "
    "from a store and builds the graphs in the step; on a GPU every step of ours builds its graphs there, "
    "chgnet's none. Ours also clips the gradient and averages the weights."
)


def row(session: Session, workload: Workload, readout: str) -> Row:
    """Time training steps."""
    found = session.row("train", workload, readout, NOTE)
    with ours.training(workload, readout, session.device) as training:
        arms = {"ours": training.step, "ours_with_graphs": training.step_with_graphs}
        if session.options.chgnet:
            arms["chgnet"] = reference.training(workload, session.device)
        session.time(found, arms)
        for name in found.keys() & {"ours", "chgnet"}:
            found[name]["counts"] = profiled(arms[name], session.device).counts
    return memory.added(found, session.options, {})
