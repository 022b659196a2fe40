"""Whatever tests launch in Triton's interpreter compiles, too: any width, and any table may be missing.

Run as a script, with launches that compile only, those tests fail, as nothing is computed: what they launch
is what counts.
"""

from __future__ import annotations

import json
import sys
import types
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from compiled import Compiler, run_script

pytest.importorskip("triton")

OPS = (
    *("bases", "bond_tables", "central_pulls", "geometry", "magmom", "message", "neighbors"),
    *("projection", "readout", "segments", "step"),
)


@pytest.mark.slow
def test_all_launches_compile() -> None:
    launches = run_script(__file__)
    assert len(launches) > 300
    assert not [launch for launch in launches if launch["error"]]


class _Trying(Compiler):
    """Goes on where a kernel does not compile."""

    def _launch(self, kernel: Any, grid: int, device: Any, *args: Any, **options: Any) -> None:
        row = {"name": f"{kernel.__module__}.{kernel.__name__}", "hash": None, "error": None}
        try:
            row["hash"] = kernel.warmup(*args, grid=(grid,), **options).hash
        except Exception as error:
            row["error"] = repr(error)
        if row not in self.found:
            self.found.append(row)


def main() -> None:
    """Print what each launch came to."""
    interpreted: Any = types.ModuleType("interpreted")
    interpreted.DEVICE, interpreted.nan_filled = "cpu", pytest.fixture(lambda: None)
    interpreted.without_syncs = nullcontext
    sys.modules["interpreted"] = interpreted
    compiler = _Trying()
    compiler.capability = 90
    tests = [str(Path(__file__).with_name(f"test_triton_{op}.py")) for op in OPS]
    with redirect_stdout(sys.stderr):
        pytest.main(["-q", "--tb=no", "-p", "no:cacheprovider", *tests])
    print(json.dumps(compiler.found))


if __name__ == "__main__":
    main()
