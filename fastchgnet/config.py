"""What a user can set, as frozen pydantic models: unknown keys are errors, every field says what it is."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """A frozen section of a run's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Config):
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
    atom_cutoff: float = Field(6.0, gt=0, description="Radius within which atoms see each other, A.")
    bond_cutoff: float = Field(3.0, gt=0, description="Radius of the bonds that form angles, A.")
    n_radial: int = Field(31, gt=0, description="Radial basis functions.")
    n_angular: int = Field(31, gt=0, description="Angular basis functions; odd for the Fourier series.")
    envelope_p: int = Field(8, gt=0, description="Order p of the cutoff envelope.")
    norm: bool = Field(True, description="LayerNorm in gated MLPs and before the energy readout.")
    readout_hidden: tuple[int, ...] = Field((64, 64, 64), description="Hidden widths of the energy readout.")
    output_bias: bool = Field(False, description="Bias behind each convolution, as in CHGNet 0.2.0.")

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.bond_cutoff > self.atom_cutoff:
            raise ValueError("bond_cutoff must not exceed atom_cutoff")
        if self.angular_basis == "fourier" and self.n_angular % 2 == 0:
            raise ValueError("n_angular must be odd for the Fourier basis: a constant, sines and cosines")
        if self.shared_layer_norm and not self.norm:
            raise ValueError("shared_layer_norm needs norm: true")
        return self


class Provenance(Config):
    """What the energies of a model, or of a data set, mean and where they come from."""

    name: str = Field(description="Name of the model or of its run.")
    functional: str = Field("unknown", description="Density functional, such as PBE/PBE+U or r2SCAN.")
    energy_correction: str = Field("unknown", description="Correction added to the energies: none, MP2020, ...")
    source: str = Field("", description="Publication, data set or run it comes from.")
    licence: str = Field("", description="Licence of the weights.")
