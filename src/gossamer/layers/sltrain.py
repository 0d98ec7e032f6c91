"""Low rank plus a fixed random sparse matrix whose values are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gossamer.distributed import whole
from gossamer.errors import UserError
from gossamer.layers.contract import FactoredLinear, check, kaiming_, spectral_, uniform_
from gossamer.optim.groups import HIDDEN_MATRIX, SPARSE_VALUES

TILE = 1 << 20
"""Entries of the weight that are dense at a time: enough for a matrix product to run at full speed."""

Tile = tuple[slice, slice, int]
"""Rows of the weight, their entries in the sorted support, and the flat index of the first of them."""


class SLTrainLinear(FactoredLinear):
    """`y = (scale B A + S) x + bias`, S zero but for `values` (nnz,) at the flat row-major `indices` (nnz,), int32."""

    hidden_parameters: ClassVar[dict[str, str]] = {"B": HIDDEN_MATRIX, "A": HIDDEN_MATRIX, "values": SPARSE_VALUES}
    indices: Tensor

    def __init__(self, linear: nn.Linear, rank: int, scale: float, density: float, generator: torch.Generator) -> None:
        super().__init__(linear, rank, scale)
        entries = linear.weight.numel()
        count = int(density * entries)
        if count < 1 or entries >= 2**31:
            raise UserError(
                f"layers: a layer of shape {tuple(linear.weight.shape)} has {count:,} sparse entries at density "
                f"{density}; allowed: at least 1, of fewer than 2^31"
            )
        self.values = nn.Parameter(linear.weight.new_empty(count), linear.weight.requires_grad)
        if linear.weight.is_meta:
            indices = torch.empty(count, dtype=torch.int32, device="meta")
        else:
            chosen = torch.randperm(entries, dtype=torch.int32, generator=generator)[:count]
            indices = chosen.sort().values.to(linear.weight.device)
        self.register_buffer("indices", indices)
        # indices on the meta device cannot be read; one tile is right for any, if larger
        single = [(slice(0, self.out_features), slice(0, count), 0)]
        self._tiles: list[Tile] | None = single if linear.weight.is_meta else None

    def rest(self) -> Tensor:
        values = whole(self.values)
        flat = values.new_zeros(self.out_features * self.in_features)
        return flat.index_add(0, self.indices, values).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        b, a, values = self.B, self.A, self.values
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, b, a, values = x.to(dtype), b.to(dtype), a.to(dtype), values.to(dtype)
        y: Tensor = _Product.apply(  # pyright: ignore
            x.reshape(-1, self.in_features), b, a, values, self.indices, self.scale, self.tiles()
        )
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def tiles(self) -> list[Tile]:
        """Consecutive rows of about `TILE` entries. Read from the device once, and again when indices were loaded."""
        if self._tiles is None:
            m, n = self.out_features, self.in_features
            rows = min(m, max(1, TILE // n))
            starts = list(range(0, m, rows))
            edges = torch.tensor([row * n for row in [*starts, m]], device=self.indices.device)
            cuts: list[int] = torch.searchsorted(self.indices.long(), edges).tolist()
            self._tiles = [
                (slice(row, min(row + rows, m)), slice(*cut), row * n)
                for row, cut in zip(starts, pairwise(cuts), strict=True)
            ]
        return self._tiles

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._tiles = None


class _Product(torch.autograd.Function):
    """`x (scale B A + S)^T`, a tile of rows of the weight at a time: neither W nor its gradient is ever whole.

    The weight is made twice (forward, backward) and `dY^T X` once; nothing of its size is saved between.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b: Tensor, a: Tensor, values: Tensor, indices: Tensor, scale: float, tiles: list[Tile]
    ) -> Tensor:
        ctx.save_for_backward(x, b, a, values, indices)
        ctx.scale, ctx.tiles = scale, tiles
        y = x.new_empty(x.shape[0], b.shape[0])
        for rows, _, w in _weights(b, a, values, indices, scale, tiles):
            torch.mm(x, w.mT, out=y[:, rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, b, a, values, indices = ctx.saved_tensors
        scale, (dy,) = ctx.scale, grads
        need_x = ctx.needs_input_grad[0]
        wide = torch.promote_types(x.dtype, torch.float32)  # sums over tiles
        dx = torch.zeros_like(x, dtype=wide) if need_x else None
        da = torch.zeros_like(a, dtype=wide)
        db, dvalues = torch.empty_like(b), torch.empty_like(values)
        tiles = zip(ctx.tiles, _weights(b, a, values, indices, scale, ctx.tiles), strict=True)
        for (_, _, first), (rows, entries, w) in tiles:
            part = dy[:, rows]
            if dx is not None and wide is x.dtype:
                dx.addmm_(part, w)  # in place: no second tensor as large as x
            elif dx is not None:
                dx += part @ w
            dw = torch.mm(part.mT, x, out=w)
            db[rows] = (dw @ a.mT).mul_(scale)
            da += (b[rows].mT @ dw).mul_(scale)
            torch.index_select(dw.view(-1), 0, indices[entries] - first, out=dvalues[entries])
        return None if dx is None else dx.to(x.dtype), db, da.to(a.dtype), dvalues, None, None, None


def _weights(
    b: Tensor, a: Tensor, values: Tensor, indices: Tensor, scale: float, tiles: list[Tile]
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, their entries of the support, and the dense weight of those rows."""
    scaled = a * scale
    for rows, entries, first in tiles:
        w = b[rows] @ scaled
        w.view(-1).index_add_(0, indices[entries] - first, values[entries])
        yield rows, entries, w


@dataclass(frozen=True)
class SLTrain:
    """Low rank plus sparse: the sparse part gives full rank for a few percent of the entries.

        W = (alpha / r) B A + S,    A ~ U(+-1/sqrt(n)),    B = 0
        S: int(density m n) entries at places drawn once and never changed, values ~ U(+-1/sqrt(n)), trained

    Paper: Han et al., SLTrain, NeurIPS 2024, arXiv 2406.02214, Section 3.

    Deviations from the authors' code:
    - Indices are int32, 4 bytes instead of 8 (`test_indices_are_int32`).
    - The weight and its gradient are made a tile of rows at a time, the gradient once instead of three times
      (`test_gradients_are_the_dense_layers`).
    - `init="spectral"`, ours: the product starts as the best rank-r approximation of the dense start, the values as
      what it misses at their places.
    """

    rank: int = 128
    """r; at most the smaller side of the smallest layer."""
    alpha: float = 32.0
    """The product is scaled by alpha / r."""
    density: float = 0.03
    """Part of the entries that the sparse matrix has: the paper's delta."""
    init: Literal["paper", "spectral"] = "paper"
    """paper: as above. spectral: truncated SVD of the dense start, and its residual at the sparse places."""

    def __post_init__(self) -> None:
        check("sltrain", rank=self.rank, alpha=self.alpha, init=self.init)
        if not 0 < self.density <= 1:
            raise UserError(f"sltrain: density is {self.density}; allowed: 0 < density <= 1")

    def wrap(self, linear: nn.Linear, generator: torch.Generator) -> SLTrainLinear:
        module = SLTrainLinear(linear, self.rank, self.alpha / self.rank, self.density, generator)
        if self.init == "spectral":
            spectral_(module, linear.weight)
            if not linear.weight.is_meta:
                with torch.no_grad():
                    residual = linear.weight - module.scale * (module.B @ module.A)
                    module.values.copy_(residual.view(-1).index_select(0, module.indices))
        else:
            kaiming_(module.A, generator)
            uniform_(module.values, module.in_features**-0.5, generator)
            with torch.no_grad():
                module.B.zero_()
        return module
