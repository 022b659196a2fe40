"""Recordings of functions, and CUDA graphs that cannot be captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from recordings import CalledAgain
from torch import Tensor

from fastchgnet.record import CudaGraphs, Recorder

CPU = torch.device("cpu")


def test_what_cannot_be_recorded_is_called(caplog: pytest.LogCaptureFixture) -> None:
    def record(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    calls: list[object] = []

    def double(shapes: object, inputs: Sequence[Tensor]) -> Tensor:
        calls.append(shapes)
        return 2 * inputs[0]

    recorder = Recorder(double, CPU, record)
    assert [recorder("a", [torch.tensor(float(n))]).item() for n in range(4)] == [0, 2, 4, 6]
    assert calls == ["a"] * 4
    assert caplog.messages == ["steps cannot be recorded and run one by one: operation not permitted"]


def test_what_has_no_shapes_of_its_own_is_not_recorded() -> None:
    record = CalledAgain(2)
    recorder = Recorder(lambda shapes, inputs: torch.cat([inputs[0], inputs[0]]), CPU, record)
    for shapes, n in ((None, 1), ("a", 1), (None, 2), ("a", 1), ("a", 1)):
        assert recorder(shapes, [torch.ones(n)]).tolist() == [1] * (2 * n)
    assert record.n_recorded == 1 and record.n_replayed == 2


class Capture:
    """Stands for `torch.cuda.graph`, whose end fails where the capture has been broken."""

    stream, device = "default", "cuda:0"

    def __init__(self, graph: object, pool: object, stream: object, capture_error_mode: str) -> None:
        assert (pool, stream, capture_error_mode) == ("pool", "own of cuda:1", "thread_local")

    def __enter__(self) -> None:
        assert Capture.device == "cuda:1"
        Capture.stream = "capturing"

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            raise RuntimeError("operation failed due to a previous error during capture")
        Capture.stream = "default"


@contextmanager
def on_stream(stream: str) -> Iterator[None]:
    before = Capture.stream
    try:
        yield
    finally:
        Capture.stream = before


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    Capture.device = str(device)
    try:
        yield
    finally:
        Capture.device = "cuda:0"


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CudaGraphs:
    """Recordings on a GPU that is not the current one."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Capture.stream)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: f"own of {Capture.device}")
    return CudaGraphs(torch.device("cuda:1"))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("operation not permitted"), torch.OutOfMemoryError("no more"), KeyboardInterrupt()],
    ids=["sync", "memory", "ctrl-c"],
)
def test_a_capture_that_fails_says_why_and_leaves_the_stream(
    graphs: CudaGraphs, error: BaseException
) -> None:
    def function() -> Any:
        assert Capture.stream == "capturing"
        raise error

    with pytest.raises(type(error)) as raised:
        graphs(function)
    assert raised.value is error and Capture.stream == "default"
