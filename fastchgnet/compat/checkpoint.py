"""Checkpoints of chgnet's trainer: `.pth.tar`, read without running anything in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from fastchgnet.config import ModelConfig, Provenance
from fastchgnet.errors import InputError
from fastchgnet.potential import Potential
from fastchgnet.published import to_our_layout
from fastchgnet.units import MAX_ATOMIC_NUMBER

# What chgnet can vary and this network cannot, with chgnet's defaults. Dropouts do nothing in evaluation.
_FIXED = {
    "atom_fea_dim": 64,
    "bond_fea_dim": 64,
    "angle_fea_dim": 64,
    "n_conv": 4,
    "atom_conv_hidden_dim": 64,
    "bond_conv_hidden_dim": 64,
    "angle_layer_hidden_dim": 0,
    "update_bond": True,
    "update_angle": True,
    "mlp_first": True,
    "non_linearity": "silu",
    "conv_norm": None,
    "final_mlp": "MLP",
    "learnable_rbf": True,
}
_COMPOSITION = "composition_model.fc.weight"
_OUTPUT_BIAS = "atom_conv_layers.0.mlp_out.layers.1.bias"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read the model of a chgnet checkpoint: its `state_dict` and `model_args`.

    Raises:
        InputError: no such file, not a checkpoint of chgnet, or one with objects that torch does not load
            safely.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle fails with anything
        raise InputError(
            f"{path}: not a checkpoint of tensors and plain values alone, and nothing else is loaded; "
            "with chgnet, save it anew: torch.save({'model': CHGNet.from_file(path).as_dict()}, new_path)"
        ) from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not {"state_dict", "model_args"} <= model.keys():
        raise InputError(
            f"{path}: not a checkpoint of chgnet: it has no model with state_dict and model_args"
        )
    return model


def potential_of(model: Mapping[str, Any], name: str) -> Potential:
    """Rebuild chgnet's model, given as its `as_dict()`, in our layout.

    What its energies mean is not known.

    Args:
        model: `state_dict` and `model_args`.
        name: what to call it in errors and in the provenance.

    Raises:
        InputError: an architecture that this network does not have, or tensors that no model has.
    """
    arguments, tensors = _parts(model, name)
    for key, expected in _FIXED.items():
        found = arguments.get(key, expected)
        if found != expected:
            raise InputError(f"{name}: {key} is {found!r}; this network has {expected!r}")
    references = tensors.pop(_COMPOSITION, torch.zeros(1, MAX_ATOMIC_NUMBER))
    if references.shape != (1, MAX_ATOMIC_NUMBER):
        raise InputError(f"{name}: its reference energies are not those of {MAX_ATOMIC_NUMBER} elements")
    config = _config(arguments, _OUTPUT_BIAS in tensors, name)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        potential = Potential(config, references[0].double(), Provenance(name=name))
    _fill(potential, tensors, name)
    return potential.eval()


def _parts(model: Any, name: str) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Arguments and tensors of a model, where they are that."""
    both = model if isinstance(model, Mapping) else {}
    arguments, tensors = both.get("model_args"), both.get("state_dict")
    if not (isinstance(arguments, Mapping) and isinstance(tensors, Mapping)):
        raise InputError(f"{name}: not what as_dict of a chgnet model gives: model_args and state_dict")
    for key, tensor in tensors.items():
        if not (isinstance(key, str) and isinstance(tensor, Tensor)):
            raise InputError(f"{name}: {key!r} in its state_dict is no tensor")
        if not torch.isfinite(tensor.to_dense()).all():
            raise InputError(f"{name}: {key} holds NaN or infinity")
    return arguments, dict(tensors)


def _config(arguments: Mapping[str, Any], output_bias: bool, name: str) -> ModelConfig:
    """Translate chgnet's arguments; those that are absent have its defaults, which are ours."""
    norms = [arguments.get("gMLP_norm", "layer"), arguments.get("readout_norm", "layer")]
    if norms not in (["layer"] * 2, [None] * 2):
        raise InputError(f"{name}: gMLP_norm and readout_norm must both be 'layer' or both None")
    renamed = {
        "atom_cutoff": "atom_graph_cutoff",
        "bond_cutoff": "bond_graph_cutoff",
        "n_radial": "num_radial",
        "n_angular": "num_angular",
        "envelope_p": "cutoff_coeff",
        "readout_hidden": "mlp_hidden_dims",
    }
    given = {ours: arguments[theirs] for ours, theirs in renamed.items() if theirs in arguments}
    try:
        return ModelConfig.model_validate(given | {"norm": norms[0] is not None, "output_bias": output_bias})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _fill(potential: Potential, tensors: Mapping[str, Tensor], name: str) -> None:
    """Load chgnet's tensors; each must find its place and none may lack."""
    try:
        potential.model.load_state_dict(to_our_layout(tensors))
    except (InputError, RuntimeError, LookupError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: its tensors do not fit this network ({reason})") from error
