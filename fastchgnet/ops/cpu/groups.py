"""C++ body of the placing of frames in groups, see `fastchgnet.train.sampler`."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray


def place(compiled: ctypes.CDLL, loads: NDArray[np.float64], most: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the group of each frame, [n]; other threads run meanwhile."""
    group_of = np.empty(len(loads), dtype=np.int64)
    # contiguous copies must outlive the call
    loads, most = np.ascontiguousarray(loads), np.ascontiguousarray(most, dtype=np.int64)
    addresses = (ctypes.c_void_p(array.ctypes.data) for array in (loads, most, group_of))
    compiled.place_frames(*addresses, *map(ctypes.c_int64, (*loads.shape, len(most))))
    return group_of
