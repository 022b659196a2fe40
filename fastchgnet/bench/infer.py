"""Energies, forces, stresses and magnetic moments of many frames, graphs included."""

from __future__ import annotations

from functools import partial

import numpy as np

from fastchgnet.bench import memory, ours, reference
from fastchgnet.bench.frames import Answer, Workload
from fastchgnet.bench.profile import profiled
from fastchgnet.bench.rows import Row
from fastchgnet.bench.session import Session
from fastchgnet.bench.timing import Work, ratios, sample

OUR_SIZES = (1, 4, 8, 16, 32, 64, 128)
CHGNET_SIZES = (1, 4, 16)
NOTE = (
    "All frames once, from ASE atoms with fastchgnet.predict and from pymatgen Structures with chgnet's "
    "predict_structure, graphs included. Our batch size is the fastest found while warming up; chgnet is "
    "timed at several, and `chgnet` and the ratio are its fastest. Counts are of that whole pass."
)


def row(session: Session, workload: Workload, readout: str) -> Row:
    """Time inference."""
    found = session.row("infer", workload, readout, NOTE)
    model, atoms = ours.Inference(readout, session.device), ours.atoms_of(workload)
    size = _fastest({n: partial(model.predict, atoms, n) for n in OUR_SIZES if n <= len(atoms)}, session)
    arms: dict[str, Work] = {"ours": partial(model.predict, atoms, size)}
    if session.options.chgnet:
        published, structures = reference.Inference(session.device), reference.structures_of(workload)
        sizes_of_chgnet = [n for n in CHGNET_SIZES if n <= len(atoms)]
        arms |= {f"chgnet_batch{n}": partial(published.predict, structures, n) for n in sizes_of_chgnet}
    samples = session.time(found, arms)
    found["ours"] |= {"batch_size": size, "counts": profiled(arms["ours"], session.device).counts}
    sizes = {"ours": size}
    if session.options.chgnet:
        best = min(sizes_of_chgnet, key=lambda n: float(np.median(samples[f"chgnet_batch{n}"].wall)))
        name = f"chgnet_batch{best}"
        counts = profiled(arms[name], session.device).counts
        found["chgnet"] = {**found[name], "batch_size": best, "counts": counts}
        found |= ratios(samples["ours"], samples[name])
        sizes["chgnet"] = best
        if readout == "conservative":
            both = model.predict(atoms, size), published.predict(structures, best)
            found["largest_difference"] = _differences(*both)
    return memory.added(found, session.options, sizes)


def _fastest(candidates: dict[int, Work], session: Session) -> int:
    """Return the batch size whose second run is the shortest."""
    seconds = {}
    for size, work in candidates.items():
        work()
        seconds[size] = sample(work, 1, session.device)[0]
    return min(seconds, key=lambda size: seconds[size])


def _differences(mine: list[Answer], theirs: list[Answer]) -> dict[str, float]:
    """Compare what the two arms said about the same frames with the same weights."""
    pairs = list(zip(mine, theirs, strict=True))
    return {
        "energy_ev_per_atom": max(abs(a[0] - b[0]) for a, b in pairs),
        "forces_ev_per_angstrom": max(float(np.abs(a[1] - b[1]).max()) for a, b in pairs),
    }
