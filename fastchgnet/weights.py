"""Files of weights: one .safetensors with the tensors and what they mean, and a readable copy beside it.

The header of `model.safetensors` holds the format's version, the model's configuration, its provenance
and anything a run adds, with a checksum of all this and the tensors; `model.safetensors.json` repeats it for
readers. Pickles are never loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fastchgnet.config import ModelConfig, Provenance
from fastchgnet.device import own_settings
from fastchgnet.errors import InputError
from fastchgnet.files import write_atomically
from fastchgnet.potential import Potential
from fastchgnet.units import MAX_ATOMIC_NUMBER

FORMAT = "fastchgnet"
FORMAT_VERSION = 2
CHECKSUM = "sha256"
"""Key of the checksum, which files written before there was one lack."""

_PICKLE_SUFFIXES = {".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".tar", ".bin"}
# A pickle of protocol 2 or later, and the zip archive in which torch.save wraps one.
_PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


class Header(BaseModel):
    """What a file of weights says about itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: ModelConfig
    provenance: Provenance
    extra: dict[str, JsonValue] = {}


def save_potential(
    potential: Potential, path: str | Path, extra_metadata: Mapping[str, JsonValue] | None = None
) -> None:
    """Write the tensors of `potential` to `path` (.safetensors) and their description to `path`.json.

    Each file appears whole or not at all: a full disk or a killed process leaves what was there before.

    Raises:
        InputError: `path` cannot be written.
    """
    path = Path(path)
    header = Header(
        config=potential.config, provenance=potential.provenance, extra=dict(extra_metadata or {})
    )
    described = {"format": FORMAT, "format_version": FORMAT_VERSION, **header.model_dump(mode="json")}
    # safetensors keeps metadata as strings, so each value is a JSON document of its own.
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in potential.state_dict().items()}
    entry = {CHECKSUM: checksum(tensors, metadata)}
    write_atomically(path, to_safetensors(tensors, metadata | entry))
    readable = json.dumps(described | entry, indent=2) + "\n"
    write_atomically(Path(f"{path}.json"), readable)


@own_settings
def load_potential(path: str | Path) -> Potential:
    """Rebuild the potential saved at `path`, on the CPU, in evaluation mode and in the dtype it was saved in.

    Raises:
        InputError: no such file, a pickle, not a whole safetensors file, not one of ours, of an unknown
            format version, damaged, of another architecture, or with weights that are not finite.
    """
    path = Path(path)
    header = read_header(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        metadata = file.metadata()
    try:
        check(tensors, metadata)
    except ValueError as error:
        raise InputError(f"{path}: damaged, {error}") from None
    # Building draws initial weights; the caller's random state must not depend on that.
    with torch.random.fork_rng(devices=[]):
        references = torch.zeros(MAX_ATOMIC_NUMBER, dtype=torch.float64)
        potential = Potential(header.config, references, header.provenance)
    flaw = _mismatch(tensors, potential.state_dict()) or _not_finite(tensors)
    if flaw:
        raise InputError(f"{path}: {flaw}")
    potential.to(next(tensors[name].dtype for name, _ in potential.named_parameters()))
    potential.load_state_dict(tensors)
    return potential.eval()


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the sha256 of tensors on the host and of metadata, but for that of the checksum itself."""
    described = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    rest = {key: value for key, value in metadata.items() if key != CHECKSUM}
    return digest(tensors, json.dumps([described, rest], sort_keys=True))


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the sha256 of a text, and of names and elements of tensors on the host."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def check(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise ValueError where the checksum that a file holds, if it holds one, is another."""
    found = checksum(tensors, metadata)
    if metadata.get(CHECKSUM, found) != found:
        raise ValueError("its checksum does not match")


def read_header(path: str | Path) -> Header:
    """Read what the file of weights at `path` says about itself, without its tensors.

    Raises:
        InputError: no such file, a pickle, not a whole safetensors file, not one of ours, or of an
            unknown format version.
    """
    path = Path(path)
    _refuse_pickles(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file, or a truncated one ({error})") from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: a safetensors file, but not one that FastCHGNet wrote")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        version = metadata.get("format_version")
        raise InputError(f"{path}: format version {version}, this FastCHGNet reads {FORMAT_VERSION}")
    try:
        return Header.model_validate(
            {key: json.loads(metadata[key]) for key in Header.model_fields if key in metadata}
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {place}: {first['msg']}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: its metadata is not JSON ({error})") from error


def _refuse_pickles(path: Path) -> None:
    """Raise InputError where there is no file, or one that only unpickling could read."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if path.suffix.lower() in _PICKLE_SUFFIXES or magic.startswith(_PICKLE_MAGIC):
        raise InputError(
            f"{path}: a pickle can run any code and is never loaded; "
            "the published CHGNet weights come as safetensors by `fastchgnet weights`"
        )


def _mismatch(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Say how the tensors of a file differ from those its configuration needs."""
    for what, names in (
        ("lacks", expected.keys() - found.keys()),
        ("has the unknown", found.keys() - expected.keys()),
    ):
        if names:
            return f"a checkpoint of another architecture: {what} {min(names)} ({len(names)} such tensors)"
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
            return f"a checkpoint of another architecture: {name} has shape {shapes}"
    precisions = {tensor.dtype for name, tensor in found.items() if name != "references"}
    if precisions not in ({torch.float32}, {torch.float64}) or found["references"].dtype != torch.float64:
        return "not the precision FastCHGNet writes: weights in float32 or float64, references in float64"
    return None


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name the first tensor with a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            return f"{name} contains NaN or infinity"
    return None


def fingerprint(potential: Potential) -> str:
    """Return a checksum of a model: its configuration and all parameters, whatever their precision."""
    digest = hashlib.sha256(potential.config.model_dump_json().encode())
    for name, value in sorted(potential.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]
