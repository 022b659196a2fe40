"""From the network to energy, forces, stress and magnetic moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor, nn

from fastchgnet.config import ModelConfig, Provenance
from fastchgnet.device import own_settings, single_precision
from fastchgnet.flat import flatten
from fastchgnet.graph import Batch, Output, Systems
from fastchgnet.heads import PairHeads, PaperHeads
from fastchgnet.model import CHGNet, Features
from fastchgnet.neighbors import build_graph
from fastchgnet.ops.derivatives import constant_parameters, feature_derivatives
from fastchgnet.ops.pair_forces import forces_and_stress
from fastchgnet.ops.segments import segment_sum
from fastchgnet.units import MAX_ATOMIC_NUMBER


class Potential(nn.Module):
    """An interatomic potential: graph in; energy, forces, stress and magnetic moments out.

    A conservative readout takes one derivative of the energy with respect to the bond vectors, which
    gives forces and virial at once; a direct readout asks heads of its own. In training mode outputs
    carry a graph for the derivative of the loss, in evaluation mode they are detached. A new potential is in
    float32, whatever torch's default is.

    Args:
        config: the network.
        references: energy of each element, H first, eV; [94], kept in float64.
        provenance: what the energies mean.
    """

    references: Tensor

    @own_settings
    def __init__(self, config: ModelConfig, references: Tensor, provenance: Provenance) -> None:
        super().__init__()
        if references.shape != (MAX_ATOMIC_NUMBER,):
            raise ValueError(
                f"references must have shape ({MAX_ATOMIC_NUMBER},), not {tuple(references.shape)}"
            )
        self.config = config
        self.provenance = provenance
        self.heads: PairHeads | PaperHeads | None = None
        with single_precision():
            self.model = CHGNet(config)
            if config.readout == "direct":
                self.heads = PairHeads(config) if config.heads == "pair" else PaperHeads(config)
        self.register_buffer("references", references.detach().double())
        flatten(list(self.in_order().values()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .float() and .to(dtype) must not round the reference energies: they are summed over all atoms
        exact = self.references
        super()._apply(fn, recurse)
        self.references = exact.to(self.references.device)
        flatten(list(self.in_order().values()))
        return self

    def in_order(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, in the order of their use, in which they lie in memory.

        A backward pass completes their gradients in about the opposite order.
        """
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        heads: Iterable[nn.Parameter] = [] if self.heads is None else self.heads.parameters()
        return {names[id(p)]: p for p in (*self.model.in_order(self.heads), *heads)}

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network."""
        return self.model.magmom.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.references.device

    def n_parameters(self) -> int:
        """Count trainable parameters and reference energies, as published counts do."""
        return sum(p.numel() for p in self.parameters()) + self.references.numel()

    @own_settings
    def build_graph(self, systems: Systems) -> Batch:
        """Build the graph of crystals with this model's cutoffs, on this model's device."""
        return build_graph(systems, self.config.atom_cutoff, self.config.bond_cutoff).to(self.device)

    @own_settings
    def forward(self, batch: Batch, derivatives: bool = True) -> Output:
        """Evaluate a batch of S systems with A atoms; shapes and units are those of `Output`.

        Without `derivatives` of the energy, forces and stress are NaN.
        """
        vector = batch.bond_vector.to(self.dtype)
        if self.heads is None and derivatives:
            return self._conservative(batch, vector)
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            head = self.heads if derivatives else None
            features = self.model(batch, vector, head)
            if head is None:
                forces = vector.new_full((len(batch.atomic_number), 3), torch.nan)
                return self._output(batch, features, forces, vector.new_full(batch.cell.shape, torch.nan))
            return self._output(batch, features, *head(batch, vector, features))

    def _conservative(self, batch: Batch, vector: Tensor) -> Output:
        # only in training will there be a derivative by parameters, too
        with torch.enable_grad(), nullcontext() if self.training else constant_parameters():
            vector = vector.detach().requires_grad_()
            features = self.model(batch, vector)
            # dE/dr_ij pulls the centre along the bond: F_i = +dE/dr_ij, F_j = -dE/dr_ij
            with feature_derivatives() if self.training else nullcontext():
                (pair_force,) = torch.autograd.grad(
                    features.site_energy,
                    vector,
                    torch.ones_like(features.site_energy),
                    create_graph=self.training,
                )
        with torch.set_grad_enabled(self.training):
            forces, stress = forces_and_stress(pair_force[:, None], vector, batch)
            output = self._output(batch, features, forces, stress)
        # the magnetic moments come from the features as they are
        return output if self.training else output._replace(magmoms=output.magmoms.detach())

    def _output(self, batch: Batch, features: Features, forces: Tensor, stress: Tensor) -> Output:
        """Add the reference energies and sum over atoms, both in float64."""
        site_energies = features.site_energy + self.references[batch.atomic_number - 1]
        energy = segment_sum(site_energies[:, None], batch.by_system).squeeze(1)
        return Output(energy, forces, stress, features.magmoms, site_energies)
