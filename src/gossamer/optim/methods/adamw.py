"""Adam with decoupled weight decay: the dense parent of everything here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.optim import rules, stores
from gossamer.optim.batch import Batch, fits
from gossamer.optim.contract import Context, State, check_adam, register
from gossamer.optim.sweep import Sweep


@register(
    "adamw",
    paper="Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101",
    matrix_only=False,
    by_rows=True,
)
@dataclass(frozen=True)
class AdamW:
    """Dense first and second moments: the reference for memory and for quality.

    Algorithm (Loshchilov and Hutter 2019, Algorithm 2; the decay is the driver's):

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        direction = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    Deviations: none; equal to `torch.optim.AdamW` (`test_adamw_is_torch`), except that gradients are cut where the sum
    of their squares would overflow: no moment becomes infinite (`test_huge_gradients_keep_the_moments_finite`).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    state_bits: Literal[32, 16, 8] = 32
    """Of each moment: fp32, or 8-bit codes with one scale for 256 neighbours in a row (`adamw-8bit`)."""

    def __post_init__(self) -> None:
        check_adam("adamw", self.betas, self.eps)
        stores.check_bits("adamw", self.state_bits)

    def init(self, param: Tensor) -> State:
        return stores.moments(param, "m", "v", bits=self.state_bits)

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        return rules.adam(*stores.adam_moments_(state, rules.cut_gradient(grad, ctx.rows), self.betas, ctx), self.eps)

    def can_sweep(self) -> bool:
        return self.state_bits == 32

    def step_(self, sweeps: Sequence[Sweep]) -> None:
        for sweep in sweeps:
            sweep.descend_adamw(self.betas, self.eps, rules.gradient_bound(sweep.dtype, sweep.grad.numel()))

    def can_launch(self, param: Tensor) -> bool:
        return fits(param) and self.state_bits == 32 and self.eps > 0

    def launch_(self, batch: Batch) -> None:
        from gossamer.kernels.adamw import step

        gain = 1 / (1 - self.betas[0] ** batch.counter("m_step"))
        spread = (1 - self.betas[1] ** batch.counter("v_step")) ** -0.5
        step(
            batch.tables,
            batch.pointers(batch.of("m")),
            batch.pointers(batch.of("v")),
            batch.numbers(batch.sign, gain, spread, self.eps, batch.decay, batch.rates, batch.seeds),
            self.betas,
            rules.gradient_bound(torch.float32, batch.params[0].numel()),
        )

    def moments(self, param: Tensor, state: State, m_step: int, v_step: int) -> State:
        """What the state stands for, bias-corrected: estimates of E g and E g^2."""
        m, v = stores.read(state, "m"), stores.read(state, "v")
        return {"m": m / (1 - self.betas[0] ** m_step), "v": v / (1 - self.betas[1] ** v_step)}


@register(
    "adamw-8bit",
    paper="Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022, arXiv 2110.02861",
    matrix_only=False,
    by_rows=True,
)
@dataclass(frozen=True)
class AdamW8bit(AdamW):
    """AdamW with both moments in 8-bit codes: a quarter of its state.

        m <- beta1 decode(m) + (1 - beta1) g;   v <- beta2 decode(v) + (1 - beta2) g^2
        direction = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)            from the moments before encoding
        encode: each 256 neighbours in a row over their largest entry, to the nearest of 256 numbers

    Paper: arXiv 2110.02861, Section 2 (blocks) and Section 1.3 (the numbers: dynamic tree quantization).

    Deviations from the paper and from bitsandbytes, its authors' code:
    - 256 entries share a scale, as in the newer code; the paper's 2048 save another 1 % of the state. Blocks end with a
      row instead of running on: a shard of rows has the codes of the whole (`test_rows_are_encoded_by_themselves`).
    - The scale carries the sign of the largest entry, which is then exact whichever it is; the codes themselves are not
      symmetric (`test_codes_keep_zero_and_the_largest_entry`).
    - A second moment that is not zero never becomes zero: next to that of a gradient 2500 times larger it would, and
      its step would be m / eps (`test_a_second_moment_does_not_vanish`).
    - Every tensor is encoded; the authors' code leaves those of fewer than 4096 entries in fp32. Embeddings, for which
      the paper asks for a normalised layer and 32 bits, are trained by the fallback unless you give them to this.
    """

    state_bits: Literal[32, 16, 8] = 8
