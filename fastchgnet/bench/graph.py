"""Our graph builder against chgnet's converter."""

from __future__ import annotations

import contextlib

from fastchgnet.bench import ours, reference
from fastchgnet.bench.frames import Workload
from fastchgnet.bench.rows import Row
from fastchgnet.bench.session import Session
from fastchgnet.bench.timing import Work, ratios
from fastchgnet.neighbors import systems_from_atoms

NOTE = (
    "Graphs of one batch. `ours` starts from ASE atoms and builds one batch, `ours_one_by_one` a batch per "
    "crystal, `ours_from_arrays` starts from the arrays that a store yields; on a GPU `ours_on_device` is "
    "what a training step does there. chgnet converts pymatgen Structures one by one, on the CPU."
)


def row(session: Session, workload: Workload, readout: str) -> Row:
    """Time graph building, which no readout changes."""
    found = session.row("graph", workload, None, NOTE)
    build, atoms = ours.graph_builder(session.device), ours.atoms_of(workload)
    systems = systems_from_atoms(atoms)
    arms: dict[str, Work] = {
        "ours": lambda: build(systems_from_atoms(atoms)),
        "ours_one_by_one": lambda: [build(systems_from_atoms([one])) for one in atoms],
        "ours_from_arrays": lambda: build(systems),
    }
    if session.options.chgnet:
        arms["chgnet"] = reference.conversion(workload)
    with contextlib.ExitStack() as stack:
        if session.device.type == "cuda":
            training = stack.enter_context(ours.training(workload, readout, session.device))
            arms["ours_on_device"] = training.build
        samples = session.time(found, arms)
    if "chgnet" in samples:
        single = ratios(samples["ours_one_by_one"], samples["chgnet"])
        found |= {f"{name}_one_by_one": value for name, value in single.items()}
    return found
