"""Files of weights: what comes back, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from reference import chgnet_modules
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastchgnet.cli import main
from fastchgnet.config import ModelConfig, Provenance
from fastchgnet.errors import InputError
from fastchgnet.potential import Potential
from fastchgnet.published import (
    PUBLISHED,
    download_wheel,
    fetch_published,
    load,
    read_published,
    to_our_layout,
)
from fastchgnet.weights import (
    CHECKSUM,
    FORMAT_VERSION,
    checksum,
    load_potential,
    read_header,
    save_potential,
)

PROVENANCE = Provenance(name="test", functional="PBE", energy_correction="none", source="nowhere")


def make_potential(**config: object) -> Potential:
    references = torch.linspace(-10, 0, 94, dtype=torch.float64)
    return Potential(ModelConfig(**config), references, PROVENANCE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a good file of weights."""
    path = tmp_path / "model.safetensors"
    save_potential(make_potential(), path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give an empty cache of published weights."""
    chgnet_modules()
    monkeypatch.setenv("FASTCHGNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rewrite(path: Path, **metadata: str | None) -> None:
    """Change the metadata of a file of weights, which loses its checksum; None takes a key out."""
    with safe_open(path, framework="pt") as file:
        changed = file.metadata() | {CHECKSUM: None} | metadata
    save_file(load_file(path), path, metadata={k: v for k, v in changed.items() if v is not None})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"readout": "direct"},
        {"readout": "direct", "heads": "paper"},
        {"norm": False, "output_bias": True},
    ],
)
def test_round_trip(tmp_path: Path, config: dict, dtype: torch.dtype) -> None:
    saved = make_potential(**config).to(dtype)
    path = tmp_path / "runs" / "best.safetensors"
    save_potential(saved, path, {"epoch": 3, "metrics": {"loss": 0.5}})
    loaded = load_potential(path)
    assert (loaded.config, loaded.provenance) == (saved.config, saved.provenance)
    assert read_header(path).extra == {"epoch": 3, "metrics": {"loss": 0.5}}
    assert not loaded.training
    tensors = loaded.state_dict()
    assert tensors["references"].dtype == torch.float64
    for name, tensor in saved.state_dict().items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    readable = json.loads((tmp_path / "runs" / "best.safetensors.json").read_text())
    assert readable["config"] == saved.config.model_dump(mode="json")
    assert readable["format_version"] == FORMAT_VERSION
    with safe_open(path, framework="pt") as file:
        assert readable[CHECKSUM] == file.metadata()[CHECKSUM] == checksum(tensors, file.metadata())
    assert len(list(path.parent.iterdir())) == 2


def test_loading_leaves_the_random_state(path: Path) -> None:
    before = torch.get_rng_state()
    load_potential(path)
    assert torch.equal(before, torch.get_rng_state())


def test_full_disk_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        with pytest.raises(InputError, match=r"model.safetensors: cannot be written \("):
            save_potential(make_potential(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.safetensors", "model.safetensors.json"]


def test_folder_that_is_a_file(path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        save_potential(make_potential(), path / "model.safetensors")


def refused(path: Path) -> str:
    """Load a bad file and give the one line it is refused with."""
    with pytest.raises(InputError) as error:
        load(path)
    line = str(error.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"model": Malice()}, tmp_path / "model.pth.tar")
    torch.save({"model": Malice()}, tmp_path / "disguised.safetensors")
    torch.save({"model": Malice()}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.safetensors").write_bytes(pickle.dumps(Malice()))
    for name in ("model.pth.tar", "disguised.safetensors", "old.safetensors", "plain.safetensors"):
        assert "pickle" in refused(tmp_path / name)
        assert "`fastchgnet weights`" in refused(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_not_safetensors(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "missing.safetensors")
    assert "cannot be read" in refused(tmp_path)
    for content in (b"", b"weights", b"not weights at all, but long enough to hold a length"):
        (tmp_path / "file.safetensors").write_bytes(content)
        assert "not a safetensors file" in refused(tmp_path / "file.safetensors")


@pytest.mark.parametrize("n_bytes", [4, 100, 100_000, -1])
def test_truncated(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:n_bytes])
    assert "truncated" in refused(path)


def test_no_damaged_byte_changes_a_model(path: Path) -> None:
    """In whatever part of the file it is: it is found, or what is loaded is the same."""
    whole, expected, known = path.read_bytes(), load(path), read_header(path)
    start = 8 + int.from_bytes(whole[:8], "little")
    n_found = 0
    for place in [*range(0, start, 41), *range(start, len(whole), 12_007), len(whole) - 1]:
        for flip in (1, 4, 128):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            try:
                found = load(path)
            except InputError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
                n_found += 1
            else:
                assert place < start and read_header(path) == known
                for name, tensor in found.state_dict().items():
                    assert torch.equal(tensor, expected.state_dict()[name])
    assert n_found > 100


def test_a_damaged_weight_is_named_by_its_file(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    assert refused(path) == f"{path}: damaged, its checksum does not match"
    assert read_header(path).provenance == PROVENANCE
    rewrite(path)  # as it was written before there were checksums
    assert load_potential(path).provenance == PROVENANCE


def test_a_checksum_tells_names_shapes_types_and_texts_apart() -> None:
    zeros, metadata = torch.zeros(2, 3), {"config": "{}"}
    sums = {
        checksum({"a": zeros}, metadata),
        checksum({"b": zeros}, metadata),
        checksum({"a": zeros.t()}, metadata),
        checksum({"a": zeros.int()}, metadata),
        checksum({"a": zeros.clone()}, metadata),
        checksum({"a": -zeros}, metadata),
        checksum({"a": zeros}, {"config": "[]"}),
    }
    assert len(sums) == 6  # two are the same
    assert checksum({"a": zeros, "b": zeros}, metadata) == checksum({"b": zeros, "a": zeros}, metadata)
    assert checksum({"a": zeros}, metadata) == checksum({"a": zeros}, metadata | {CHECKSUM: "any"})


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"format": None}, "not one that FastCHGNet wrote"),
        ({"format_version": "99"}, f"format version 99, this FastCHGNet reads {FORMAT_VERSION}"),
        ({"config": '{"n_radail": 31}'}, "config.n_radail: Extra inputs are not permitted"),
        ({"config": "{"}, "metadata is not JSON"),
        ({"provenance": None}, "provenance: Field required"),
    ],
)
def test_foreign_metadata(path: Path, metadata: dict, reason: str) -> None:
    rewrite(path, **metadata)
    assert reason in refused(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model.magmom.bias": None}, "another architecture: lacks model.magmom.bias"),
        ({"model.extra": torch.zeros(1)}, "another architecture: has the unknown model.extra"),
        ({"model.magmom.bias": torch.zeros(2)}, r"has shape \(2,\) instead of \(1,\)"),
        ({"model.magmom.bias": torch.tensor([torch.nan])}, "model.magmom.bias contains NaN or infinity"),
        ({"model.magmom.bias": torch.zeros(1, dtype=torch.int32)}, "not the precision FastCHGNet writes"),
        ({"references": torch.zeros(94)}, "not the precision FastCHGNet writes"),
    ],
)
def test_other_tensors(path: Path, change: dict, reason: str) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != CHECKSUM}
    tensors = {name: t for name, t in (load_file(path) | change).items() if t is not None}
    save_file(tensors, path, metadata=metadata)
    assert re.search(reason, refused(path))


def test_load_options(path: Path) -> None:
    assert load(path, dtype="float64").dtype == torch.float64
    assert load(str(path), device="auto").dtype == torch.float32
    with pytest.raises(InputError, match="dtype float16"):
        load(path, dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="device nowhere"):
        load(path, device="nowhere")
    with pytest.raises(
        InputError, match=r"no such file or model.*chgnet-0\.2\.0, chgnet-0\.3\.0, chgnet-r2scan"
    ):
        load("chgnet")


# As published: the third angle update and 94 reference energies included.
@pytest.mark.parametrize(
    ("name", "n_published"),
    [("chgnet-0.2.0", 400_438), ("chgnet-0.3.0", 412_525), ("chgnet-r2scan", 412_525)],
)
def test_published_parameters(cache: Path, name: str, n_published: int) -> None:
    """Every published number is there, once, but for the layer that never reaches an output."""
    potential = load(name)
    config = potential.config
    dropped = 2 * (4 * 64 * 64 + 64) + (2 * 2 * 64 if config.norm else 0)
    assert potential.n_parameters() == n_published - dropped
    assert not potential.training
    source = torch.load(installed() / PUBLISHED[name].file, map_location="cpu", weights_only=True)["model"][
        "state_dict"
    ]
    kept = torch.cat([t.flatten() for n, t in source.items() if not n.startswith("angle_layers.2.")])
    ours = torch.cat([t.flatten().float() for t in potential.state_dict().values()])
    assert torch.equal(kept.sort().values, ours.sort().values)


def test_importer_refuses_what_it_does_not_know() -> None:
    with pytest.raises(InputError, match=r"atom_conv_layers\.0\.atom_norm\.weight has no place"):
        to_our_layout({"atom_conv_layers.0.atom_norm.weight": torch.zeros(64)})


def installed() -> Path:
    converter, _, _ = chgnet_modules()
    return Path(converter.__file__).parents[1] / "pretrained"


def test_altered_checkpoint(tmp_path: Path) -> None:
    checkpoint = PUBLISHED["chgnet-0.3.0"]
    altered = tmp_path / checkpoint.file
    altered.parent.mkdir()
    altered.write_bytes((installed() / checkpoint.file).read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match=r"sha256 is .*, the published checkpoint has d14ab7c0"):
        read_published(checkpoint, tmp_path)


def test_damaged_cache_is_renewed(cache: Path) -> None:
    path = fetch_published("chgnet-0.3.0")
    assert path.parent == cache
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1000])
    assert fetch_published("chgnet-0.3.0") == path
    assert path.stat().st_size == size


def test_other_weights_under_a_published_name_are_replaced(cache: Path) -> None:
    """r2scan has the configuration of 0.3.0."""
    path = fetch_published("chgnet-0.3.0")
    path.write_bytes(fetch_published("chgnet-r2scan").read_bytes())
    assert load("chgnet-0.3.0").provenance.name == "chgnet-0.3.0"


def test_many_processes_at_once(cache: Path) -> None:
    """Tasks of one job array find an empty cache together."""
    command = [sys.executable, "-c", "import fastchgnet.published as p; p.load('chgnet-0.3.0')"]
    tasks = [subprocess.Popen(command) for _ in range(2)]
    assert [task.wait(120) for task in tasks] == [0, 0]
    assert sorted(p.suffix for p in cache.iterdir()) == [".json"] * 3 + [".safetensors"] * 3


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip finds the wheel, here in a folder in place of an index, whatever platform runs the test."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(
        InputError, match=r"cannot download chgnet==0\.4\.2 \(.*where there is a network"
    ) as error:
        download_wheel(tmp_path)
    assert "\n" not in str(error.value)
    wheel = index / "chgnet-0.4.2-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "chgnet-0.4.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: chgnet\nVersion: 0.4.2\n"
        )
        archive.writestr("chgnet-0.4.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n")
        archive.writestr("chgnet-0.4.2.dist-info/RECORD", "")
    assert download_wheel(tmp_path).read_bytes() == wheel.read_bytes()


@pytest.mark.slow
def test_download_from_the_index(tmp_path: Path) -> None:
    """The published wheel holds the published checkpoints."""
    with zipfile.ZipFile(download_wheel(tmp_path)) as archive:
        for checkpoint in PUBLISHED.values():
            content = archive.read(f"chgnet/pretrained/{checkpoint.file}")
            assert hashlib.sha256(content).hexdigest() == checkpoint.sha256


def test_command(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastchgnet", "weights", "--json", "chgnet-r2scan"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["functional"]) == ("chgnet-r2scan", "r2SCAN")
    assert Path(row["path"]).parent == cache
    monkeypatch.setattr(sys, "argv", ["fastchgnet", "weights", "chgnet-9"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: chgnet-9: no such file or model")
