"""Weights that are a product of two thin factors from the first step on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from gossamer.layers.contract import FactoredLinear, check, kaiming_, spectral_


class LowRankLinear(FactoredLinear):
    """`y = scale B (A x) + bias`."""


@dataclass(frozen=True)
class LowRank:
    """Both factors trained, nothing else: r (m + n) numbers instead of m n.

        W = (alpha / r) B A,    A ~ U(+-1/sqrt(n)),    B ~ U(+-1/sqrt(r))

    Paper: the "Low-Rank" baseline of arXiv 2505.22922 and of GaLore (arXiv 2403.03507), Section 5.1.

    With the papers' start the entries of W have the standard deviation alpha / (3 r sqrt(n)), which shrinks as models
    grow (3.7e-3 at 60M, 4.6e-4 at 1B, where a dense Llama starts from 2e-2), and Adam's steps of W shrink with it, as
    alpha / r. `init="spectral"` starts from the best rank-r approximation of the dense layer's own start instead.
    """

    rank: int = 128
    """r; at most the smaller side of the smallest layer."""
    alpha: float = 32.0
    """The product is scaled by alpha / r."""
    init: Literal["paper", "spectral"] = "paper"
    """paper: as above. spectral: truncated SVD of the dense start, balanced."""

    def __post_init__(self) -> None:
        check("low-rank", rank=self.rank, alpha=self.alpha, init=self.init)

    def wrap(self, linear: nn.Linear, generator: torch.Generator) -> LowRankLinear:
        module = LowRankLinear(linear, self.rank, self.alpha / self.rank)
        if self.init == "spectral":
            spectral_(module, linear.weight)
        else:
            kaiming_(module.A, generator)
            kaiming_(module.B, generator)
        return module
