"""Fused operations on rows of features: each one mathematics, a PyTorch body and, for CUDA, a Triton one.

Ops know no crystals. Each is a chain of library ops, the backward and the backward of the backward being
ops of their own, so that a loss on forces trains; see `fastchgnet.ops._register`.
"""
