"""Fused operations on rows of features: each one mathematics, a PyTorch body and, for CUDA, a Triton one.

Ops know no crystals. Each is a chain of library ops, the backward and the backward of the backward being
ops of their own, so that a loss on forces trains; see `fastchgnet.ops._register`.
"""

import torch as _torch

# On CPUs the vector library behind these chooses its code at the first call. Where two threads made that at
# once, one of them got less exact code in three processes of a hundred: sines were off by 3e-5.
for _dtype in (_torch.float32, _torch.float64):
    _torch.zeros(1, dtype=_dtype).sin().cos()
