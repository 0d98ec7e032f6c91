"""A frozen dense weight and a thin trainable product beside it; and the same, merged at every restart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.distributed import put_, whole
from gossamer.layers.contract import FactoredLinear, Restart, check, kaiming_
from gossamer.optim.rounding import write_


class LoRALinear(FactoredLinear):
    """`y = W0 x + scale B (A x) + bias` with W0 frozen in `base`, (m, n)."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(linear, rank, scale)
        for factor in (self.B, self.A):  # of a frozen layer too: that is what adapters are for
            factor.requires_grad_()
        self.base = nn.Parameter(linear.weight.detach(), requires_grad=False)

    def start(self, generator: torch.Generator) -> None:
        """A as torch starts a linear layer, B zero: the layer's function is W0's, and B has a gradient."""
        kaiming_(self.A, generator)
        with torch.no_grad():
            self.B.zero_()

    def rest(self) -> Tensor:
        return whole(self.base)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.base, self.bias) + self.product(x)


class ReLoRALinear(LoRALinear):
    """A LoRA layer whose restart adds the product to the frozen weight and begins a new one."""

    @torch.no_grad()
    def restart(self, generator: torch.Generator) -> Restart:
        wide = torch.promote_types(self.base.dtype, torch.float32)
        base = whole(self.base)
        target = base.to(wide) + self.scale * (whole(self.B).to(wide) @ whole(self.A).to(wide))
        merged = base.clone()
        # a bf16 weight rounded to nearest would lose every product smaller than about 1/256 of it
        device = torch.Generator(base.device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        write_(merged, target, "stochastic", device)
        put_(self.base, merged)
        fresh = torch.empty(self.A.shape, dtype=base.dtype, device=base.device)
        kaiming_(fresh, generator)
        put_(self.A, fresh)
        self.B.zero_()
        return Restart((whole(self.base).to(wide) - target).norm() / target.norm())


@dataclass(frozen=True)
class LoRA:
    """Train a thin product beside the frozen dense start.

        W = W0 + (alpha / r) B A,    A ~ U(+-1/sqrt(n)),    B = 0

    Paper: Hu et al., ICLR 2022, arXiv 2106.09685. This one is for pre-training experiments and merges back into a plain
    model; no dropout. Fine-tuning has the `peft` library.
    """

    rank: int = 128
    """r; at most the smaller side of the smallest layer."""
    alpha: float = 32.0
    """The product is scaled by alpha / r."""

    def __post_init__(self) -> None:
        check("lora", rank=self.rank, alpha=self.alpha)

    def wrap(self, linear: nn.Linear, generator: torch.Generator) -> LoRALinear:
        module = LoRALinear(linear, self.rank, self.alpha / self.rank)
        module.start(generator)
        return module


@dataclass(frozen=True)
class ReLoRA(LoRA):
    """LoRA that adds its product to the frozen weight at every restart and begins a new one: a high-rank sum.

        every T steps:  W0 <- W0 + (alpha / r) B A;    A ~ U(+-1/sqrt(n));    B <- 0;    the moments of A and B <- 0

    Paper: Lialin et al., ICLR 2024, arXiv 2307.05695. The restarts are `Restarts`: every T steps, with their reset of
    the moments and their recovery of the learning rate. The paper starts from some full-rank steps; train those
    separately, without layers.

    Deviations:
    - The authors' code also starts A at zero, so that nothing moves before the first merge; ours is drawn
      (`test_relora_moves_and_merges`).
    - The moments are reset whole, where the authors prune 99.9 % of them (`Restarts(reset=...)`).
    - Merges happen after steps T, 2T, ...; theirs one step later. bf16 weights are merged with stochastic rounding.
    """

    def wrap(self, linear: nn.Linear, generator: torch.Generator) -> ReLoRALinear:
        module = ReLoRALinear(linear, self.rank, self.alpha / self.rank)
        module.start(generator)
        return module
