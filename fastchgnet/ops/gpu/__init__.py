"""Triton bodies of the ops, for GPUs. Modules of kernels are imported at the first call on one."""
