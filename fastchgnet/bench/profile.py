"""What one call executes: operators, kernels, launches, waits; counted by torch's profiler."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastchgnet.bench.timing import Work, synchronize

_NOT_OPERATORS = ("autograd::", "torch::", "c10::")
_LAUNCHES = (
    "cudaLaunchKernel",
    "cuLaunchKernel",
    "cudaGraphLaunch",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
)
# torch.cuda.synchronize, with which a measurement ends, is not among them: cudaDeviceSynchronize.
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


class Profile(NamedTuple):
    """One call, taken apart."""

    counts: dict[str, int | None]
    top: list[dict[str, Any]]  # operators by their own time, longest first


def profiled(work: Work, device: torch.device, n_top: int = 0) -> Profile:
    """Run the work once, already warm, under the profiler.

    Counts are `ops`, the operators called from outside any other operator, views included; and on a GPU
    `kernels` executed there (copies and fills included), `launches` from the host and `waits` of the host
    for the device.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it reports its own start and stop
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    synchronize(device)
    # there is one cycle only, and without `acc_events` torch warns that it forgets the others
    with profile(activities=activities, acc_events=True) as recorded:
        work()
        synchronize(device)
    events = recorded.events() or []
    counts: dict[str, int | None] = {"ops": sum(map(_is_outermost, events))}
    if device.type == "cuda":
        names = [event.name for event in events]
        on_device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        # Without the rights to trace the device there are no events of it: unknown, not zero.
        counts["kernels"] = len(on_device) or None
        counts["launches"] = sum(name.startswith(_LAUNCHES) for name in names)
        counts["waits"] = sum(name in _WAITS for name in names)
    return Profile(counts, _top(recorded, device, n_top) if n_top else [])


def _is_operator(event: Any) -> bool:
    return "::" in event.name and not event.name.startswith(_NOT_OPERATORS)


def _is_outermost(event: Any) -> bool:
    if event.device_type != DeviceType.CPU or not _is_operator(event):
        return False
    parent = event.cpu_parent
    while parent is not None and not _is_operator(parent):
        parent = parent.cpu_parent
    return parent is None


def _top(recorded: profile, device: torch.device, n_top: int) -> list[dict[str, Any]]:
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    averages = recorded.key_averages()
    total = sum(getattr(entry, key) for entry in averages)
    longest = sorted(averages, key=lambda entry: -getattr(entry, key))[:n_top]
    return [
        {
            "name": entry.key,
            "calls": entry.count,
            "self_ms": getattr(entry, key) / 1e3,
            "share": getattr(entry, key) / total if total else 0.0,
        }
        for entry in longest
    ]
