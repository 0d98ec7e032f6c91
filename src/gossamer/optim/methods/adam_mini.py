"""Adam-mini: one second moment for a block of weights that learn alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.errors import UserError, nearest
from gossamer.optim import rules, stores
from gossamer.optim.contract import Context, State, check_adam, register
from gossamer.rows import entries


@register(
    "adam-mini",
    paper="Zhang et al., Adam-mini, ICLR 2025, arXiv 2406.16793",
    matrix_only=False,
    by_rows=True,
)
@dataclass(frozen=True)
class AdamMini:
    """AdamW with a second moment of one number a block: half of its state.

        m <- beta1 m + (1 - beta1) g
        v_b <- beta2 v_b + (1 - beta2) mean(g_b^2)                                  for each block b
        direction_b = m_b / (1 - beta1^t) / (sqrt(v_b / (1 - beta2^t)) + eps)

    Paper: arXiv 2406.16793, Algorithm 1; the blocks are those of Algorithm 3.

    Deviations:
    - A method sees one parameter and neither its role nor the number of heads. `blocks="row"` is the paper's partition
      for values, attention outputs, MLPs, embeddings and heads of the model: one block an output neuron or token. For
      queries and keys it asks for one block an attention head: give those `blocks=<number of heads>` by a rule
      (`param_groups(..., rules=[("q_proj", AdamMini(blocks=32)), ...])`); by row they get more blocks than it says.
    - Vectors and scalars are one block each, as in the paper; a rule or the fallback can train them otherwise.
    - A parameter of more than two dimensions has a block for each index of its first.
    - Gradients are cut where the sum of their squares would overflow.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    blocks: Literal["row", "tensor"] | int = "row"
    """One block a row, one in all, or this number of blocks of consecutive rows, which must divide the rows."""

    def __post_init__(self) -> None:
        check_adam("adam-mini", self.betas, self.eps)
        if self.blocks not in ("row", "tensor") and (not isinstance(self.blocks, int) or self.blocks < 1):
            hint = nearest(str(self.blocks), ("row", "tensor"))
            raise UserError(f"adam-mini: blocks is {self.blocks!r}{hint}; allowed: row, tensor, an integer >= 1")

    def init(self, param: Tensor) -> State:
        count = self._count(param)
        v = torch.zeros(count, dtype=stores.arithmetic_dtype(param), device=param.device)
        return {**stores.dense(param, "m"), "v": v}

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        beta1, beta2 = self.betas
        grad = rules.cut_gradient(grad, ctx.rows)
        m = state["m"].lerp_(grad, 1 - beta1)
        one = grad.ndim < 2 or self.blocks in ("tensor", 1)
        size = entries(grad, ctx.rows) // (1 if one else ctx.rows.shape(state["v"])[0])
        blocks = grad.reshape(1, -1) if one else grad.reshape(-1, size)
        squares = torch.linalg.vector_norm(blocks, dim=1).square_()
        v = state["v"].lerp_((ctx.rows.sum(squares) if one else squares).div_(size), 1 - beta2)
        m_hat = (m / (1 - beta1**ctx.m_step)).reshape(blocks.shape)
        return rules.adam(m_hat, v[:, None] / (1 - beta2**ctx.v_step), self.eps).view(grad.shape)

    def _count(self, param: Tensor) -> int:
        if param.ndim < 2 or self.blocks == "tensor":
            return 1
        if self.blocks == "row":
            return param.shape[0]
        if param.shape[0] % int(self.blocks):
            shape = tuple(param.shape)
            raise UserError(f"adam-mini: blocks is {self.blocks} for shape {shape}; allowed: divisors of {shape[0]}")
        return int(self.blocks)
