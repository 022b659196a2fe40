"""The published CHGNet checkpoints: taken from a chgnet wheel, converted to our layout, kept in a cache.

Nothing of chgnet is imported or unpickled. The tensors of a checkpoint are read with torch's
`weights_only`, after its sha256 has been checked, and every one of them must find its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastchgnet.config import ModelConfig, Provenance
from fastchgnet.device import own_settings, pick_device
from fastchgnet.errors import InputError
from fastchgnet.files import cache_folder
from fastchgnet.potential import Potential
from fastchgnet.weights import load_potential, save_potential

CHGNET_VERSION = "0.4.2"
_LICENCE = "BSD-3-Clause-LBNL, (c) 2023 The Regents of the University of California"
_MPTRJ = "chgnet {}: Deng et al., Nature Machine Intelligence 5, 1031 (2023), trained on MPtrj"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint inside the chgnet wheel."""

    file: str  # below chgnet/pretrained
    sha256: str
    config: ModelConfig
    provenance: Provenance


_ALL = (
    Published(
        file="0.2.0/chgnet_0.2.0_e30f77s348m32.pth.tar",
        sha256="ef624f78b6db9d315b4ef256f1bb3207449924191b91720dc17d3f60c5df980e",
        config=ModelConfig(
            atom_cutoff=5,
            n_radial=9,
            n_angular=9,
            envelope_p=5,
            norm=False,
            readout_hidden=(64, 64),
            output_bias=True,
        ),
        provenance=Provenance(
            name="chgnet-0.2.0",
            functional="PBE/PBE+U",
            energy_correction="MP2020",
            source=_MPTRJ.format("0.2.0"),
            licence=_LICENCE,
        ),
    ),
    Published(
        file="0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar",
        sha256="d14ab7c0f093efe64b60a7bcd540bca10e74fb7f46c86108a079af60524659d1",
        config=ModelConfig(),
        provenance=Provenance(
            name="chgnet-0.3.0",
            functional="PBE/PBE+U",
            energy_correction="MP2020",
            source=_MPTRJ.format("0.3.0"),
            licence=_LICENCE,
        ),
    ),
    Published(
        file="r2scan/chgnet_r2scan_transfer_learning_e15f36s161m23.pth.tar",
        sha256="8eba3db0f35a2788bb3ae22885ad340591e27996f213c6643af522a633b50dad",
        config=ModelConfig(),
        provenance=Provenance(
            name="chgnet-r2scan",
            functional="r2SCAN",
            # Neither the checkpoint nor its description says whether the energies were corrected.
            energy_correction="unknown",
            source="chgnet r2scan: Huang et al., npj Computational Materials (2025), MP-r2SCAN, from 0.3.0",
            licence=_LICENCE,
        ),
    ),
)
# What our network leaves out: chgnet's third angle update never reaches an output.
_DROPPED = "angle_layers.2."
# chgnet's layers.1 is the linear layer of an MLP without a hidden one, behind a dropout.
_FIRST_LAYER = (
    r"(atom_conv|bond_conv|angle)_layers\.(\d)\.twoBody_\w+\.mlp_(core|gate)\.layers\.[01]\.(weight|bias)"
)
_MODULES = {"atom_conv": "atom_convs", "bond_conv": "bond_convs", "angle": "angle_updates"}
_PROJECTIONS = {
    "atom_conv": ("{}.{}.{}", ("center", "bond", "neighbor")),
    "bond_conv": ("{}.first.{}.{}", ("bond_i", "bond_j", "angle", "center")),
    "angle": ("{}.first.{}.{}", ("bond_i", "bond_j", "angle", "center")),
}
# Hidden layers and norms of core and gate, which ours stacks; bn1 is that of the core.
_STACKED = (
    r"(atom_conv|bond_conv|angle)_layers\.(\d)\.\w+\.(?:mlp_)?(core|gate|bn1|bn2)\.(?:layers\.3\.)?(\w+)"
)
_BRANCHES = {"bn1": "core", "bn2": "gate"}
_NORM_NAMES = {"weight": "scale", "bias": "shift"}
_RENAMED = {
    r"atom_embedding\.embedding\.(\w+)": r"atom_embedding.\1",
    r"bond_basis_expansion\.rbf_expansion_ag\.frequencies": "atom_basis.frequency",
    r"bond_basis_expansion\.rbf_expansion_bg\.frequencies": "bond_basis.frequency",
    r"angle_basis_expansion\.fourier_expansion\.frequencies": "angle_basis.frequency",
    r"bond_weights_ag\.(\w+)": r"atom_weight.\1",
    r"bond_weights_bg\.(\w+)": r"bond_weight.\1",
    r"((?:bond|angle)_embedding|readout_norm)\.(\w+)": r"\1.\2",
    r"(atom|bond)_conv_layers\.(\d)\.mlp_out\.layers\.1\.(\w+)": r"\1_convs.\2.out.\3",
    r"site_wise\.(\w+)": r"magmom.\1",
    # A dropout before the last linear layer shifts its number there.
    r"mlp\.layers\.([024])\.(\w+)": r"readout.\1.\2",
    r"mlp\.layers\.5\.(\w+)": r"readout.4.\1",
    r"mlp\.layers\.7\.(\w+)": r"readout.6.\1",
}
PUBLISHED = {checkpoint.provenance.name: checkpoint for checkpoint in _ALL}


@own_settings
def load(
    name_or_path: str | Path, device: str = "cpu", dtype: Literal["float32", "float64"] = "float32"
) -> Potential:
    """Load a published potential by name, or one of yours from its .safetensors file, ready to predict.

    Published names are chgnet-0.2.0, chgnet-0.3.0 and chgnet-r2scan; they are fetched on first use.
    `device` is a device of torch, or "auto": a GPU where there is one.

    Raises:
        InputError: an unknown name, device or dtype, weights that cannot be fetched, or a bad file.
    """
    if dtype not in ("float32", "float64"):
        raise InputError(f"dtype {dtype}: choose float32 or float64")
    potential = load_potential(weights_path(name_or_path))
    return potential.to(pick_device(device), getattr(torch, dtype))


def weights_path(name_or_path: str | Path) -> Path:
    """Return the file of a published model, fetched on first use, or the path that was given.

    Raises:
        InputError: neither a file nor a published name, or weights that cannot be fetched.
    """
    name = str(name_or_path)
    is_file = isinstance(name_or_path, Path) or name.endswith(".safetensors") or Path(name).exists()
    return Path(name) if is_file and name not in PUBLISHED else fetch_published(name)


def fetch_published(name: str) -> Path:
    """Return the safetensors file of a published checkpoint, importing it into the cache on first use.

    The checkpoint comes from an installed chgnet, else from the chgnet wheel on the package index. Any
    number of processes may ask at once: each writes a whole file.

    Raises:
        InputError: an unknown name, no chgnet and no way to download it, or an altered checkpoint.
    """
    if name not in PUBLISHED:
        raise InputError(f"{name}: no such file or model; published are {', '.join(PUBLISHED)}")
    if not _is_cached(name):
        with _pretrained_folder() as folder:
            # One wheel holds them all; a second name must not cost a second download.
            for other in PUBLISHED:
                if other == name or not _is_cached(other):
                    save_potential(read_published(PUBLISHED[other], folder), cache_path(other))
    return cache_path(name)


def describe(name: str) -> dict[str, str | int]:
    """Fetch a published checkpoint and say what it is: name, parameters, functional, correction, path.

    Parameters and reference energies are counted as in publications, without the layer that never reaches
    an output.

    Raises:
        InputError: as `fetch_published`.
    """
    path = fetch_published(name)
    potential = load_potential(path)
    return {
        "name": name,
        "parameters": potential.n_parameters(),
        "functional": potential.provenance.functional,
        "correction": potential.provenance.energy_correction,
        "path": str(path),
    }


def cache_path(name: str) -> Path:
    """Return where the published weights `name` are kept."""
    return cache_folder() / f"{name}.safetensors"


def read_published(checkpoint: Published, folder: Path) -> Potential:
    """Check and convert a checkpoint found below `folder`, chgnet's folder of pretrained models.

    Raises:
        InputError: the file is missing or is not the published one.
    """
    path = folder / checkpoint.file
    if not path.is_file():
        raise InputError(f"{path}: missing; chgnet {CHGNET_VERSION} has it")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != checkpoint.sha256:
        raise InputError(f"{path}: sha256 is {found}, the published checkpoint has {checkpoint.sha256}")
    source = torch.load(path, map_location="cpu", weights_only=True)["model"]["state_dict"]
    references = source.pop("composition_model.fc.weight")[0].double()
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        potential = Potential(checkpoint.config, references, checkpoint.provenance)
    potential.model.load_state_dict(to_our_layout(source))
    return potential.eval()


def to_our_layout(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rearrange tensors named as in chgnet into those of our network; gradients of them as well.

    First layers act on concatenated features: their columns become one projection per feature, core
    and gate packed along the output, the bias kept with the centre atom's. Hidden layers and norms of core
    and gate are stacked. All else is renamed.

    Args:
        published: every tensor of a chgnet model but its composition model, by its name there.

    Raises:
        InputError: a tensor has no place in our network.
    """
    ours: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    stacked: dict[str, dict[str, Tensor]] = {}
    for name, tensor in published.items():
        if name.startswith(_DROPPED):
            continue
        if first := re.fullmatch(_FIRST_LAYER, name):
            kind, block, branch, quantity = first.groups()
            prefix, features = _PROJECTIONS[kind]
            parts = {"center": tensor}
            if quantity == "weight":
                parts = dict(zip(features, tensor.chunk(len(features), dim=1), strict=True))
            for feature, part in parts.items():
                place = f"{_MODULES[kind]}.{prefix.format(block, feature, quantity)}"
                packed.setdefault(place, {})[branch] = part
        elif second := re.fullmatch(_STACKED, name):
            kind, block, branch, quantity = second.groups()
            quantity = _NORM_NAMES[quantity] if branch in _BRANCHES else quantity
            place = f"{_MODULES[kind]}.{block}.message.{quantity}"
            stacked.setdefault(place, {})[_BRANCHES.get(branch, branch)] = tensor
        else:
            ours[_renamed(name)] = tensor
    ours |= {name: torch.cat([half["core"], half["gate"]]) for name, half in packed.items()}
    return ours | {name: torch.stack([half["core"], half["gate"]]) for name, half in stacked.items()}


def _renamed(name: str) -> str:
    """Find the name in our network of a tensor that keeps its shape."""
    for pattern, new in _RENAMED.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(new)
    raise InputError(f"published checkpoint: {name} has no place in this network")


def _is_cached(name: str) -> bool:
    """Whether the cache holds these weights as this version of the package writes them."""
    path = cache_path(name)
    if not path.exists():
        return False
    try:
        held, published = load_potential(path), PUBLISHED[name]
        return held.config == published.config and held.provenance == published.provenance
    except InputError as error:
        logger.warning("importing %s anew: %s", name, error)
        return False


@contextlib.contextmanager
def _pretrained_folder() -> Iterator[Path]:
    """Yield chgnet's folder of pretrained models: the installed one, else that of a downloaded wheel."""
    installed = importlib.util.find_spec("chgnet")
    for place in (installed.submodule_search_locations or ()) if installed else ():
        folder = Path(place) / "pretrained"
        if all((folder / checkpoint.file).is_file() for checkpoint in _ALL):
            yield folder
            return
    with tempfile.TemporaryDirectory() as temporary:
        wheel = download_wheel(Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(temporary, [f"chgnet/pretrained/{checkpoint.file}" for checkpoint in _ALL])
        yield Path(temporary) / "chgnet" / "pretrained"


def download_wheel(folder: Path) -> Path:
    """Download the chgnet wheel into `folder` through pip, without its dependencies.

    The platform is fixed: only its checkpoints matter, and they are the same in every wheel.

    Raises:
        InputError: pip is missing or finds no package index; says what to do.
    """
    requirement = f"chgnet=={CHGNET_VERSION}"
    target = ["--platform", "manylinux2014_x86_64", "--python-version", "3.11", "--implementation", "cp"]
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary=:all:"]
    command += [*target, *quiet, "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("chgnet-*.whl"))
    if done.returncode or not wheels:
        reason = next(iter(done.stderr.strip().splitlines()[-1:]), "pip failed")
        raise InputError(
            f"cannot download {requirement} ({reason}); run `fastchgnet weights` where there is a network, "
            f"or `pip install {requirement}`, or copy {cache_path('*').parent} from another machine"
        )
    return wheels[0]
