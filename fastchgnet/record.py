"""Record a function of device tensors once for each shape, and replay it with one call of the host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastchgnet.errors import first_line

logger = logging.getLogger(__name__)

Inputs = Sequence[Tensor]
Function = Callable[[Any, Inputs], Tensor]
"""Function of what the shapes are called, and of tensors that have them; it may change others in place."""


class Record(Protocol):
    """Makes recordings."""

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record `function`, and return what replays it and the tensor that holds its result then."""


class CudaGraphs:
    """Recordings as CUDA graphs that share their memory, as they never run side by side.

    Args:
        device: where what is recorded works; another one may be current.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            # that of `torch.cuda.graph` is on the device where it was used first
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture `function`, which is not run; raise what it raises."""
        with torch.cuda.device(self._device):
            return self._capture(function)

    def _capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph, failure = torch.cuda.CUDAGraph(), None
        # where a capture fails, `torch.cuda.graph` would leave its own stream the current one
        here = torch.cuda.stream(torch.cuda.current_stream())
        # the thread that prepares the next batch goes on meanwhile
        captured = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            with here, captured:
                try:
                    result = function()
                except BaseException as error:
                    failure = error
                    raise
        except RuntimeError:
            if failure is not None:  # it broke the capture, whose own error says no more than that
                raise failure from None
            raise
        return graph.replay, result


def recording_on(device: torch.device) -> Record | None:
    """Return what records on a device, if anything does."""
    return CudaGraphs(device) if device.type == "cuda" else None


class _Recording(NamedTuple):
    inputs: list[Tensor]
    replay: Callable[[], None]
    result: Tensor


class Recorder:
    """Call a function; from the second call with the same shapes on, replay it.

    The first call with new shapes runs the function as it is and warms it up: kernels get compiled, libraries
    take their workspaces. Where recording fails, one warning says why and the function is called as it is
    from then on.

    Args:
        function: what to call.
        device: where it takes its inputs.
        record: makes recordings; None for none.
    """

    def __init__(self, function: Function, device: torch.device, record: Record | None) -> None:
        self._function, self._device, self._record = function, device, record
        self._seen: set[Hashable] = set()
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, shapes: Hashable, inputs: Inputs) -> Tensor:
        """Return the function's result, which the next call may overwrite.

        Args:
            shapes: names the shapes of the inputs; None where they are seen once.
            inputs: tensors on the device, or on the host in pinned memory, for which it does not wait.
        """
        recording = self._recorded(shapes, inputs)
        if recording is None:
            return self._function(shapes, [t.to(self._device, non_blocking=True) for t in inputs])
        # behind the replay before, which may still read what was there
        torch._foreach_copy_(recording.inputs, list(inputs), non_blocking=True)
        recording.replay()
        return recording.result

    def stop(self) -> None:
        """Drop all recordings and make no more."""
        self._record = None
        self._recordings.clear()

    def _recorded(self, shapes: Hashable, inputs: Inputs) -> _Recording | None:
        """Return the recording for these shapes; None where the function is to be called as it is."""
        if self._record is None or shapes is None:
            return None
        if shapes not in self._seen:
            self._seen.add(shapes)
            return None
        if shapes not in self._recordings:
            try:
                self._recordings[shapes] = self._make(self._record, shapes, inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                logger.warning("steps cannot be recorded and run one by one: %s", first_line(error))
                logger.debug("where it failed", exc_info=error)
                self.stop()
                return None
        return self._recordings[shapes]

    def _make(self, record: Record, shapes: Hashable, inputs: Inputs) -> _Recording:
        fixed = [tensor.to(self._device, copy=True) for tensor in inputs]
        replay, result = record(lambda: self._function(shapes, fixed))
        return _Recording(fixed, replay, result)
