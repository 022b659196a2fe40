"""Import torch-sim, whose own warnings would end the tests."""

import warnings

with warnings.catch_warnings():
    # torch-sim 0.6 compiles with torch.jit, which PyTorch 2.13 deprecates
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
    import torch_sim  # noqa: F401
