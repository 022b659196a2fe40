"""What a user can set, as frozen pydantic models: unknown keys are errors, every field says what it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from fastchgnet.errors import InputError

AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
"""A path; a relative one is taken from the current directory, whatever file names it."""


class Config(BaseModel):
    """A frozen record of known keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Section(Config):
    """A section of a run's configuration; its numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)


class ModelConfig(Section):
    """Where published checkpoints differ, and what we ablate; everything else is code (docs/model.md)."""

    readout: Literal["conservative", "direct"] = Field(
        "conservative", description="Forces and stress: derivatives of the energy, or heads of their own."
    )
    heads: Literal["pair", "paper"] = Field(
        "pair", description="Heads of a direct readout: symmetric pair scalars, or the paper's Eqs. 7 and 9."
    )
    interaction: Literal["sequential", "parallel"] = Field(
        "sequential", description="Blocks as in CHGNet (Eq. 10), or without their dependency (Eq. 11)."
    )
    shared_layer_norm: bool = Field(
        False, description="One LayerNorm for core and gate of a gated MLP, as the paper counts parameters."
    )
    angular_basis: Literal["fourier", "chebyshev"] = Field(
        "fourier", description="Learnable Fourier series in the angle, or polynomials in its cosine."
    )
    atom_cutoff: float = Field(6.0, gt=0, le=20, description="Radius within which atoms see each other, A.")
    bond_cutoff: float = Field(3.0, gt=0, description="Radius of the bonds that form angles, A.")
    n_radial: int = Field(31, gt=0, le=1000, description="Radial basis functions.")
    n_angular: int = Field(
        31, gt=0, le=1000, description="Angular basis functions; odd for the Fourier series."
    )
    envelope_p: int = Field(8, gt=0, description="Order p of the cutoff envelope.")
    norm: bool = Field(True, description="LayerNorm in gated MLPs and before the energy readout.")
    readout_hidden: tuple[PositiveInt, ...] = Field(
        (64, 64, 64), description="Hidden widths of the energy readout."
    )
    output_bias: bool = Field(False, description="Bias behind each convolution, as in CHGNet 0.2.0.")

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.bond_cutoff > self.atom_cutoff:
            raise ValueError("bond_cutoff must not exceed atom_cutoff")
        if self.angular_basis == "fourier" and (self.n_angular % 2 == 0 or self.n_angular < 3):
            raise ValueError(
                "n_angular must be 3, 5, ... for the Fourier basis: a constant, sines and cosines"
            )
        if self.shared_layer_norm and not self.norm:
            raise ValueError("shared_layer_norm needs norm: true")
        return self


class Provenance(Config):
    """What the energies of a model, or of a data set, mean and where they come from."""

    name: str = Field(description="Name of the model or of its run.")
    functional: str = Field("unknown", description="Density functional, such as PBE/PBE+U or r2SCAN.")
    energy_correction: str = Field(
        "unknown", description="Correction added to the energies: none, MP2020, ..."
    )
    source: str = Field("", description="Publication, data set or run it comes from.")
    licence: str = Field("", description="Licence of the weights.")


class LossConfig(Section):
    """Weights of the four targets: a preset, and single weights that replace those of the preset."""

    preset: Literal["paper", "chgnet"] = Field(
        "paper", description="Weights of E, F, S, M: paper 2, 1.5, 0.1, 0.1 or chgnet 1, 1, 0.1, 0.1."
    )
    energy: float | None = Field(None, ge=0, description="Weight of the energy per atom, instead.")
    forces: float | None = Field(None, ge=0, description="Weight of the forces, instead.")
    stress: float | None = Field(None, ge=0, description="Weight of the stress, instead.")
    magmoms: float | None = Field(None, ge=0, description="Weight of the magnetic moments, instead.")
    delta: float = Field(
        0.1, gt=0, description="Error from which the Huber loss is linear: eV/atom, eV/A, GPa, mu_B."
    )

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of energy, forces, stress and magnetic moments."""
        preset = (2.0, 1.5, 0.1, 0.1) if self.preset == "paper" else (1.0, 1.0, 0.1, 0.1)
        own = (self.energy, self.forces, self.stress, self.magmoms)
        return tuple(p if o is None else o for o, p in zip(own, preset, strict=True))


class OptimConfig(Section):
    """Adam, its learning rate over the run, and what keeps the steps steady."""

    learning_rate: float = Field(1e-3, gt=0, description="Highest learning rate.")
    base_batch_size: int | None = Field(
        None,
        gt=0,
        description="Batch size at which `learning_rate` holds; others scale it, Eq. 14. Null for never.",
    )
    final_fraction: float = Field(
        0.01, ge=0, le=1, description="Learning rate at the end of the cosine, relative to the highest."
    )
    warmup_epochs: float = Field(
        0.0, ge=0, description="Epochs, also fractions, over which the rate first rises linearly."
    )
    clip_norm: float | None = Field(
        1.0, gt=0, description="Norm to which a longer gradient is shortened; null for never."
    )
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="Decay per step of the averaged weights that are kept; 0 for none."
    )

    def highest_rate(self, batch_size: int) -> float:
        """Highest learning rate for batches of so many frames, those of all processes together (Eq. 14)."""
        scale = 1 if self.base_batch_size is None else batch_size / self.base_batch_size
        return scale * self.learning_rate


class DataConfig(Section):
    """Where the frames come from and how many make a batch."""

    train: AbsolutePath = Field(description="Store of training frames, from `fastchgnet prepare`.")
    val: AbsolutePath | None = Field(
        None, description="Store of validation frames; without one, the splits of the training store."
    )
    split_seed: int = Field(0, ge=0, description="Seed of the splits, where there is no `val`.")
    batch_size: int = Field(32, gt=0, description="Most frames in a batch, that of all processes together.")
    balance: Literal["lpt", "paper", "sequential"] = Field(
        "lpt", description="How frames are divided into batches of even size; sequential leaves it to chance."
    )
    accumulate: int = Field(
        1,
        gt=0,
        description="Parts in which each process takes its share of a batch, one by one: less memory.",
    )
    resident: Literal["auto", "off"] = Field(
        "auto", description="Frames live in the GPU's memory where they take little of it, or are sent to it."
    )


class TrainConfig(Section):
    """The run: where it is kept, how long it is, what it starts from."""

    out: AbsolutePath = Field(description="Folder of the run.")
    epochs: int = Field(30, gt=0, description="Passes over the training frames.")
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of the initial weights and of the order of the frames."
    )
    device: str = Field("auto", description="cpu, cuda, or auto: a GPU where there is one.")
    dtype: Literal["float32", "float64"] = Field("float32", description="Precision of the network.")
    init: str | None = Field(
        None, description="Weights to start from: a .safetensors file or the name of a published model."
    )
    references: Literal["fit", "keep"] = Field(
        "fit", description="Reference energies: fitted to the training frames, or those of `init`."
    )
    capture: Literal["auto", "off"] = Field(
        "auto", description="Steps on a GPU are recorded as CUDA graphs and replayed, or launched one by one."
    )
    checkpoint_minutes: float = Field(
        10.0, gt=0, description="Longest time between two checkpoints within an epoch."
    )
    timeout_minutes: float = Field(
        10.0, gt=0, description="Longest wait of one process for another, of several that share the run."
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.references == "keep" and self.init is None:
            raise ValueError("references: keep needs init, whose reference energies it keeps")
        return self


class RunConfig(Section):
    """Everything that decides a training run; one YAML file."""

    model: ModelConfig = Field(ModelConfig(), description="The network.")
    loss: LossConfig = Field(LossConfig(), description="What is minimised.")
    optim: OptimConfig = Field(OptimConfig(), description="How it is minimised.")
    data: DataConfig = Field(description="The frames.")
    train: TrainConfig = Field(description="The run.")


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that occurs twice is an error, not a silent loss of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [key.value for key, _ in node.value]
        for key, (key_node, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} twice", key_node.start_mark)
        return super().construct_mapping(node, deep)


# A date that does not exist is a ValueError, and a thousand brackets exceed Python's stack.
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML file, with `section.key=value` overrides, whose values are YAML too.

    Raises:
        InputError: no such file, not YAML, an unknown key, or a value that does not fit; names each key.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file") from error
    except _YAML_ERRORS as error:
        raise InputError(f"{path}: not YAML: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected sections with keys, such as `train:` with `out: FOLDER`")
    for override in overrides:
        _override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {'; '.join(map(_describe, error.errors()))}") from error


def _override(values: dict[str, object], override: str) -> None:
    """Set one `section.key=value` in nested dictionaries."""
    name, equals, text = override.partition("=")
    *sections, key = name.split(".")
    if not (equals and key):
        raise InputError(f"--set {override}: expected section.key=value, such as optim.learning_rate=1e-3")
    for depth, section in enumerate(sections, start=1):
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError(f"--set {override}: {'.'.join(sections[:depth])} is not a section")
        values = inner
    try:
        values[key] = yaml.load(text, _UniqueKeys)
    except _YAML_ERRORS as error:
        raise InputError(f"--set {override}: not YAML: {_one_line(error)}") from error


def _describe(error: ErrorDetails) -> str:
    """Say in a few words what pydantic found wrong with one key."""
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown key {name}"
    if error["type"] == "missing":
        return f"missing key {name}"
    return f"{name}: {error['msg'].removeprefix('Value error, ')}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
