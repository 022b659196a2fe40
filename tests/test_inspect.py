"""`inspect`: the numbers of a report are those of the frames, and the picture is drawn."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ase.data import chemical_symbols
from frames import labelled_frames
from rich.console import Console
from typer.testing import CliRunner

from fastchgnet.cli import app
from fastchgnet.config import Provenance
from fastchgnet.data import report
from fastchgnet.data.store import Store, write_store
from fastchgnet.errors import InputError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("inspect") / "frames"
    write_store(labelled_frames(40), path, Provenance(name="test", functional="PBE"))
    return Store(path)


def test_report_counts_what_is_in_the_frames(store: Store) -> None:
    frames = list(labelled_frames(40))
    found = report.inspect(store)
    atoms = Counter(chemical_symbols[z] for frame in frames for z in frame.numbers)
    assert found.elements == atoms
    assert found.config_types == {"bulk": 20, "hot": 20}
    assert found.n_materials == len({frame.group for frame in frames})
    assert found.distributions["atoms"].total == sum(len(frame.numbers) for frame in frames)
    assert found.distributions["bonds"].total == store.sizes[:, 1].sum() / 2
    assert found.distributions["angles"].maximum == store.sizes[:, 3].max()
    assert found.distributions["atoms"].percentiles["50"] == np.median(store.sizes[:, 0])


def test_table_shows_coverage_and_provenance(store: Store) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.render(report.inspect(store)))
    text = console.export_text()
    for expected in ("magmoms 80.0%", "PBE", "angles between bonds within 3 A", "hot", "Cu"):
        assert expected in text


def test_picture_is_drawn_even_without_angles(store: Store, tmp_path: Path) -> None:
    report.plot(store, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    single = [frame for frame in labelled_frames(8) if len(frame.numbers) == 1]
    write_store(single, tmp_path / "single", Provenance(name="test"))
    report.plot(Store(tmp_path / "single"), tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.png", "single", "sizes.png"]
    with pytest.raises(InputError, match="cannot be drawn"):
        report.plot(store, tmp_path / "sizes.xlsx")


def test_picture_needs_matplotlib(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install"):
        report.plot(store, tmp_path / "sizes.png")


def test_command(store: Store, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(store.path), "--json", "--png", str(tmp_path / "a.png")])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["counts"]["n_frames"] == 40
    assert (tmp_path / "a.png").exists()
    assert isinstance(CliRunner().invoke(app, ["inspect", str(tmp_path)]).exception, InputError)
