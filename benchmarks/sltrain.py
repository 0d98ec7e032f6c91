"""Three ways to compute with a low-rank plus sparse weight: forward and backward, time and peak of temporaries.

- tiles: `SLTrainLinear`: the weight dense, a tile of rows at a time;
- dense: the weight dense at once, gradients by autograd;
- sparse: thin products for B A; for S a CSR product, its transpose, and a sampled dense-dense product.

Times are ratios to `nn.Linear` in the same round, medians over rounds; peaks are bytes beyond what is there before and
after, in units of the dense weight.

    python benchmarks/sltrain.py            # writes results/sltrain_product.jsonl
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gossamer.layers import SLTrain, SLTrainLinear
from gossamer.train.log import hardware, versions


@dataclass(frozen=True)
class Options:
    """Shapes are (out_features, in_features) of Llama 60m, 350m and 1b."""

    shapes: tuple[tuple[int, int], ...] = ((512, 512), (1376, 512), (1024, 2736), (2048, 2048), (5461, 2048))
    tokens: int = 4096
    rank: int = 128
    density: float = 0.03
    rounds: int = 7
    dtype: str = "float32"
    device: str = "cpu"
    out: Path = Path("results/sltrain_product.jsonl")


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once, of storages made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {storage._cdata for storage in _storages(args)}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in old:
                self.alive.setdefault(StorageWeakRef(storage), storage.nbytes())
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return out


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    parts = [(t.values(),) if t.layout in (torch.sparse_csr, torch.sparse_csc) else (t,) for t in tensors]
    return [part.untyped_storage() for group in parts for part in group]


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, m: int) -> Tensor:
        s = torch.sparse_csr_tensor(rows, columns, values, (m, x.shape[1]))
        ctx.save_for_backward(x, s)
        return (s @ x.mT).mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s = ctx.saved_tensors
        (dy,) = grads
        dx = (s.transpose(0, 1) @ dy.mT).mT
        zero = torch.sparse_csr_tensor(s.crow_indices(), s.col_indices(), torch.zeros_like(s.values()), s.shape)
        dvalues = torch.sparse.sampled_addmm(zero, dy.mT.contiguous(), x).values()
        return dx, dvalues, None, None, None


def ways(layer: SLTrainLinear) -> dict[str, Callable[[Tensor], Tensor]]:
    m, n = layer.out_features, layer.in_features
    flat = layer.indices.long()
    rows = torch.searchsorted(flat, torch.arange(0, m * n + 1, n, device=flat.device)).int()
    columns = (flat % n).int()

    def dense(x: Tensor) -> Tensor:
        w = (layer.scale * (layer.B @ layer.A)).view(-1).index_add(0, layer.indices, layer.values).view(m, n)
        return nn.functional.linear(x, w)

    def sparse(x: Tensor) -> Tensor:
        y: Tensor = _Sparse.apply(x, layer.values, rows, columns, m)  # pyright: ignore
        return layer.product(x) + y

    return {"tiles": layer, "dense": dense, "sparse": sparse}


def _forget(leaves: list[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def main(options: Options) -> None:
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    for m, n in options.shapes:
        linear = nn.Linear(n, m, bias=False, device=device, dtype=dtype)
        layer = SLTrain(options.rank, density=options.density).wrap(linear, torch.Generator().manual_seed(0))
        layer.tiles()
        x = torch.randn(options.tokens, n, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(options.tokens, m, device=device, dtype=dtype)
        leaves = [x, linear.weight, *layer.parameters()]
        candidates = {"linear": linear, **ways(layer)}
        times: dict[str, list[float]] = {name: [] for name in candidates}
        peaks: dict[str, int] = {}
        exact = nn.functional.linear(x, layer.scale * (layer.B @ layer.A) + layer.rest()).detach()
        for turn in range(options.rounds + 1):  # the first one warms up
            for name, way in candidates.items():
                if device.type == "cuda":
                    torch.cuda.synchronize()
                begun = time.perf_counter()
                y = way(x)
                y.backward(dy)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn:
                    times[name].append(time.perf_counter() - begun)
                elif name != "linear":
                    torch.testing.assert_close(y.detach(), exact, rtol=1e-2, atol=1e-2)
                _forget(leaves)
        for name, way in candidates.items():
            with Peak() as peak:
                way(x).backward(dy)
            kept = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
            peaks[name] = peak.bytes - kept - dy.nbytes  # the output is as large as its gradient
            _forget(leaves)
        row = {
            "shape": [m, n],
            "tokens": options.tokens,
            "rank": options.rank,
            "density": options.density,
            "dtype": options.dtype,
            "rounds": options.rounds,
            "time_ratio": {
                name: median(a / b for a, b in zip(times[name], times["linear"], strict=True))
                for name in candidates
                if name != "linear"
            },
            "linear_ms": median(times["linear"]) * 1e3,
            "peak_over_weight": {name: size / linear.weight.nbytes for name, size in peaks.items()},
        }
        row |= {"versions": versions(), "hardware": hardware()}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            {k: v for k, v in row.items() if k in ("shape", "time_ratio", "peak_over_weight", "linear_ms")}, flush=True
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
