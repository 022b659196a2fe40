"""The TorchSim interface where there is no TorchSim; `make test-torchsim` tests it where there is."""

import importlib
import sys

import pytest


def test_says_what_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_sim", None)
    monkeypatch.delitem(sys.modules, "fastchgnet.sim.torchsim", raising=False)
    with pytest.raises(
        ImportError, match=r"pip install 'fastchgnet\[torchsim\]' on Python 3.12 or newer"
    ) as raised:
        importlib.import_module("fastchgnet.sim.torchsim")
    assert "\n" not in str(raised.value)
