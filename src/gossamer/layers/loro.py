"""Low-rank weights whose restarts are exact Riemannian steps on the manifold of rank-r matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer import linalg
from gossamer.distributed import put_, whole
from gossamer.errors import UserError
from gossamer.layers.contract import Restart, check, product_change, uniform_
from gossamer.layers.low_rank import LowRankLinear


class LOROLinear(LowRankLinear):
    """A low-rank layer that repeats the optimizer's last step as a step along the manifold."""

    before: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def remember(self) -> None:
        self.before = self.B.detach().clone(), self.A.detach().clone()

    @torch.no_grad()
    def restart(self, generator: torch.Generator) -> Restart:
        if self.before is None:
            raise UserError("loro: the step before this restart was not remembered; call restarter.resume(step) first")
        wide = torch.promote_types(self.B.dtype, torch.float32)
        b, a = (whole(factor).to(wide) for factor in self.before)
        self.before = None
        new_b, new_a = exact_step(b, a, b - whole(self.B).to(wide), a - whole(self.A).to(wide))
        put_(self.B, new_b)
        put_(self.A, new_a)
        return Restart(product_change(b, a, whole(self.B).to(wide), whole(self.A).to(wide)))


def exact_step(b: Tensor, a: Tensor, step_b: Tensor, step_a: Tensor) -> tuple[Tensor, Tensor]:
    """Descend from `W = B A` along the tangent direction that steps of the factors mean, then go to the nearest rank r.

        B = Qb Rb;  A^T = Qa Ra;   X = dB Ra^{-1};  Y = (Rb^{-T} dA)^T         dW = Qb Y^T + (X - Qb Qb^T X) Qa^T
        W - dW = [Qb Qb'] [[Rb Ra^T - Y^T Qa, -Ra'^T], [-Rb', 0]] [Qa Qa']^T   Qb' Rb' = X - Qb Qb^T X, Qa' Ra' likewise

    and the SVD of the 2r x 2r matrix, cut to r, is split evenly. No m x n matrix is formed.

    Args:
        b: (m, r). a: (r, n), fp32 or fp64. step_b, step_a: what was subtracted from them, learning rate and all.
    """
    rank = b.shape[1]
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    x, y = step_b @ _inverse(r_a), step_a.mT @ _inverse(r_b)
    other_b, rest_b = torch.linalg.qr(x - q_b @ (q_b.mT @ x))
    other_a, rest_a = torch.linalg.qr(y - q_a @ (q_a.mT @ y))
    top = torch.cat([r_b @ r_a.mT - y.mT @ q_a, -rest_a.mT], 1)
    bottom = torch.cat([-rest_b, torch.zeros_like(rest_b)], 1)
    u, s, vh = linalg.svd(torch.cat([top, bottom]))
    root = s[:rank].sqrt()
    return (
        torch.cat([q_b, other_b], 1) @ (u[:, :rank] * root),
        (root[:, None] * vh[:rank]) @ torch.cat([q_a, other_a], 1).mT,
    )


def _inverse(r: Tensor) -> Tensor:
    """Of an r x r matrix; zero along directions that it does not have, so that none of them steps to infinity."""
    u, s, vh = linalg.svd(r)
    there = s > torch.finfo(s.dtype).eps * len(s) * s[0]
    return vh.mT @ (torch.where(there, s.reciprocal(), 0)[:, None] * u.mT)


@dataclass(frozen=True)
class LORO:
    """Low-rank weights; between restarts factors step as in `low-rank`, at a restart along the manifold.

        W = B A,    B and A Xavier uniform;    every T steps the last step is made again, exactly (`exact_step`)

    Paper: Mo, Huang and Pan, LORO, ICLR 2025. Wants `Restarts(reset="moments", scope="all")`: an exact step leaves the
    moments in coordinates that are gone.

    Deviations:
    - The step of a factor is what the optimizer took, whichever it is, decay included (`test_loro_steps_exactly`).
    - The authors multiply the learning rate of factors by r / hidden_size. Here that is the choice of `lr` beside
      `fallback_lr`.
    - The block of arXiv 2505.22922's code that takes Rb for Rb' is not reproduced; its steps were about twice too long.
    """

    rank: int = 128
    """r; at most the smaller side of the smallest layer."""

    def __post_init__(self) -> None:
        check("loro", rank=self.rank)

    def wrap(self, linear: nn.Linear, generator: torch.Generator) -> LOROLinear:
        module = LOROLinear(linear, self.rank, 1.0)
        for factor in (module.B, module.A):
            uniform_(factor, (6 / sum(factor.shape)) ** 0.5, generator)
        return module
