"""Random numbers that are a function of where they are used, and of nothing that happened before.

Philox4x32-10 (Salmon et al., SC11, doi:10.1145/2063384.2063405) turns a counter and a key into four random
words. The key is the seed of a run; the counter holds the step, the atom's place in its crystal, and the
crystal's stream. So there is no state to store, a restarted run finds the same numbers, and those of a
crystal do not depend on who else is in the batch or on the order of evaluation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

_BLOCK = 64
"""Steps whose numbers are drawn at once, at most: for small crystals drawing is all overhead."""

_BLOCK_ROWS = 1 << 16
"""Atoms times steps drawn at once, at most: 20 MB on the way."""

START = -1
"""The step that stands for what is drawn before the first one: velocities."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return four random words for each counter; words are int64 below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # products above 2^63 wrap around, and the mask removes the sign that the shift brings in
        product0, product1 = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0 = ((product1 >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((product0 >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def gaussian(seed: int, step: Tensor, stream: Tensor, atom: Tensor) -> Tensor:
    """Draw three normal numbers for each atom and step, [N, A, 3] float64, by Box and Muller.

    Args:
        seed: of the run.
        step: [N] int64.
        stream: stream of each atom's crystal, [A] int64.
        atom: place of each atom in its crystal, [A] int64.
    """
    step = step[:, None]
    counter = torch.broadcast_tensors(step & _WORD, (step >> 32) & _WORD, atom, stream)
    words = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    # the centres of 2^32 intervals: never 0, whose logarithm is none; the largest normal number is 6.8
    first, angle, second, other = ((word.double() + 0.5) * 2.0**-32 for word in words)
    radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * angle
    third = (-2 * second.log()).sqrt() * (2 * math.pi * other).cos()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), third], dim=-1)


class Noise:
    """The normal numbers of a run, step by step.

    Args:
        seed: of the run.
        stream: stream of each atom's crystal, [A] int64; its device is where numbers are drawn.
        atom: place of each atom in its crystal, [A] int64.
    """

    def __init__(self, seed: int, stream: Tensor, atom: Tensor) -> None:
        self._seed, self._stream, self._atom = seed, stream, atom
        self._length = max(1, min(_BLOCK, _BLOCK_ROWS // max(1, len(atom))))
        self._first: int | None = None  # step of the first numbers that are there
        self._drawn = torch.empty(0)

    def at(self, step: int) -> Tensor:
        """Return those of one step, [A, 3]."""
        first = step - step % self._length
        if first != self._first:
            steps = torch.arange(first, first + self._length, device=self._atom.device)
            self._drawn, self._first = gaussian(self._seed, steps, self._stream, self._atom), first
        return self._drawn[step - first]

    def start(self) -> Tensor:
        """Return those of before the first step, [A, 3]."""
        steps = torch.tensor([START], device=self._atom.device)
        return gaussian(self._seed, steps, self._stream, self._atom)[0]
