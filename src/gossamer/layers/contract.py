"""What a low-rank layer is, by example.

    names = layers.apply(model, layers.LowRank(rank=128))   # hidden linear layers now hold two thin factors
    ...                                                      # train as ever; factors are parameters
    layers.merge_all(model)                                  # and are dense linear layers again

A layer stands in for an `nn.Linear` of weight W (m, n) = (out_features, in_features) and holds

    W = scale B A + rest            B (m, r), A (r, n); rest: nothing, a sparse matrix, a frozen dense one

A parametrization is a frozen dataclass that wraps a linear layer in such a module; the functions here do the rest.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gossamer import linalg
from gossamer.distributed import put_, whole
from gossamer.errors import UserError
from gossamer.optim.contract import check_choice, check_rank
from gossamer.optim.groups import HIDDEN_MATRIX


class Parametrization(Protocol):
    """The contract. Implemented by frozen dataclasses whose fields are the hyperparameters."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    __init__: Any
    """Takes the fields, all of which have defaults."""

    @property
    def rank(self) -> int:
        """Columns of B and rows of A."""
        ...

    def wrap(self, linear: nn.Linear, generator: torch.Generator) -> FactoredLinear:
        """A module in place of `linear`, with its bias, dtype, device and mode.

        `generator` is on the CPU, where every random number is drawn; on the meta device none is.

        Raises:
            UserError: the layer is too small for the rank.
        """
        ...


class Restart(NamedTuple):
    """What a restart did to a layer."""

    change: Tensor
    """Frobenius norm of the difference over the norm before: of the product B A where only that is rewritten, of the
    whole weight where it is merged. On the layer's device."""


class FactoredLinear(nn.Module):
    """A linear layer of weight `scale B A + rest()`. Subclasses say what the rest is and how to compute with it.

    Args:
        linear: the layer that this one replaces: its bias is taken over; dtype, device, mode and whether it is trained
            are kept.
        rank: r, at most min(m, n).
        scale: of the product B A.

    Raises:
        UserError: the rank is out of range.
    """

    hidden_parameters: ClassVar[dict[str, str]] = {"B": HIDDEN_MATRIX, "A": HIDDEN_MATRIX}
    """What `gossamer.param_groups` takes this module's parameters for."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        smaller = min(linear.weight.shape)
        if not 1 <= rank <= smaller:
            raise UserError(
                f"layers: rank is {rank} for a layer of shape {tuple(linear.weight.shape)}; allowed: 1 to {smaller}"
            )
        self.rank, self.scale = rank, scale
        self.trained = linear.weight.requires_grad
        self.B = nn.Parameter(linear.weight.new_empty(self.out_features, rank), self.trained)
        self.A = nn.Parameter(linear.weight.new_empty(rank, self.in_features), self.trained)
        self.bias = linear.bias
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The dense matrix, (m, n), made anew each time: for models that read their layers' weights."""
        return weight(self)

    def rest(self) -> Tensor | None:
        """The part of the weight beside the product, dense, (m, n), in the layer's dtype; None for zero."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x (scale B A)^T + bias` by two thin products: the matrix is never formed."""
        inner = nn.functional.linear(x, self.A)
        return nn.functional.linear(inner if self.scale == 1 else inner * self.scale, self.B, bias)

    def remember(self) -> None:
        """Called before the optimizer step that a restart follows."""

    def restart(self, generator: torch.Generator) -> Restart:
        """Write the weight in fresh factors. Here: balanced ones of the same product."""
        return refactorize(self)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"scale={self.scale:g}, bias={self.bias is not None}"
        )


@linalg.without_autocast()
def weight(module: FactoredLinear) -> Tensor:
    """The dense matrix that the layer stands for, (m, n), in its dtype; computed in fp32 or wider, rounded once.

    Differentiable.
    """
    wide = torch.promote_types(module.B.dtype, torch.float32)
    dense = module.scale * (whole(module.B).to(wide) @ whole(module.A).to(wide))
    rest = module.rest()
    return (dense if rest is None else dense + rest).to(module.B.dtype)


@torch.no_grad()
def merge(module: FactoredLinear) -> nn.Linear:
    """A dense linear layer of the same function, dtype, device and mode, trained if the one that was replaced was."""
    m, n = module.out_features, module.in_features
    linear = nn.Linear(n, m, bias=False, device="meta")
    linear.weight = nn.Parameter(weight(module), module.trained)
    linear.bias = module.bias
    return linear.train(module.training)


@torch.no_grad()
def refactorize(module: FactoredLinear) -> Restart:
    """Balance the factors, `B A = U S V^T -> (U sqrt(S)) (sqrt(S) V^T)`, and keep the product.

    Two thin QRs and the SVD of an r x r matrix, in fp32 or wider: no m x n matrix is formed and each factor is rounded
    once. The rest of the weight is not touched. Every process ends with the same bits.

    Paper: arXiv 2505.22922, Section 4 (weight refactorization; Lemma 4.1 on the condition number).
    """
    wide = torch.promote_types(module.B.dtype, torch.float32)
    b, a = whole(module.B).to(wide), whole(module.A).to(wide)
    new_b, new_a = balanced(b, a)
    put_(module.B, new_b)
    put_(module.A, new_a)
    return Restart(product_change(b, a, whole(module.B).to(wide), whole(module.A).to(wide)))


def balanced(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product with `B^T B = A A^T = S`, its singular values.

    A direction that the product does not have would be zero in both factors, and so would be its gradients, for ever:
    such a row of A keeps the size of the smallest one that counts, and its column of B makes up for it. A zero product
    is left as it is.

    Args:
        b: (m, r). a: (r, n). fp32 or fp64.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, s, vh = linalg.svd(r_b @ r_a.mT)
    there = s > 10 * torch.finfo(s.dtype).eps * s[0]  # below lies the rounding of two QRs and an SVD
    smallest = torch.where(there, s, s[0]).amin()
    a_root = torch.where(there, s, smallest).sqrt()
    return (
        torch.where(s[0] > 0, q_b @ (u * (s / a_root)), b),
        torch.where(s[0] > 0, (a_root[:, None] * vh) @ q_a.mT, a),
    )


def product_change(b: Tensor, a: Tensor, new_b: Tensor, new_a: Tensor) -> Tensor:
    """`|B' A' - B A| / |B A|` from thin factors alone, without cancellation: a scalar; 0 where both are zero."""
    difference = _product_norm(torch.cat([new_b, -b], 1), torch.cat([new_a, a]))
    size = _product_norm(b, a)
    return torch.where(difference > 0, difference / size, difference)


def _product_norm(b: Tensor, a: Tensor) -> Tensor:
    r_b, r_a = torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.mT, mode="r").R
    return (r_b @ r_a.mT).norm()


def uniform_(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill with U(-bound, bound), drawn in fp32 on the CPU: the same numbers on every device."""
    if not tensor.is_meta:
        draw = torch.empty(tensor.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            tensor.copy_(draw)


def kaiming_(tensor: Tensor, generator: torch.Generator) -> None:
    """`kaiming_uniform_(a=sqrt(5))`, as torch starts its linear layers: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    uniform_(tensor, tensor.shape[1] ** -0.5, generator)


@torch.no_grad()
def spectral_(module: FactoredLinear, dense: Tensor) -> None:
    """Factors whose scaled product is the best rank-r approximation of a dense weight, balanced."""
    if dense.is_meta:
        return
    u, s, vh = linalg.svd(dense.to(torch.promote_types(dense.dtype, torch.float32)))
    root = (s[: module.rank] / module.scale).sqrt()
    module.B.copy_(u[:, : module.rank] * root)
    module.A.copy_(root[:, None] * vh[: module.rank])


INITS = ("paper", "spectral")


def check(name: str, *, rank: int, alpha: float = 1.0, init: str = "paper") -> None:
    """Refuse what no layer of any size can be built from."""
    check_rank(name, rank)
    if not 0 < alpha < math.inf:
        raise UserError(f"{name}: alpha is {alpha}; allowed: finite numbers > 0")
    check_choice(name, init=(init, INITS))
