"""Low-rank layers: their gradients, how they get into a model and out of it, and what they are in their limits.

Where nothing else is said numbers are fp64 and 1e-12 is a few hundred of its roundings: sums of tens of products.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import gossamer
from gossamer import UserError, layers
from gossamer.layers import LORO, PARAMETRIZATIONS, FactoredLinear, LowRank, ReLoRA, SLTrain
from gossamer.layers.loro import exact_step
from gossamer.models import build_model, resolve_config
from gossamer.optim.contract import build

F64 = torch.float64
BF16 = torch.bfloat16
SHAPES = {"tall": (14, 6), "wide": (6, 14), "square": (9, 9)}
NAMES = list(PARAMETRIZATIONS)
TILE = "gossamer.layers.sltrain.TILE"

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
names = pytest.mark.parametrize("name", NAMES)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parametrization(name: str, **fields: Any) -> Any:
    """With a rank for small layers, and a scale that is not 1."""
    cls = PARAMETRIZATIONS[name]
    known = {"rank": 3, "alpha": 1.5, "density": 0.2} | fields
    return cls(**{key: value for key, value in known.items() if key in cls.__dataclass_fields__})


def linear(shape: tuple[int, int], *, bias: bool = False, dtype: torch.dtype = F64, seed: int = 0) -> nn.Linear:
    m, n = shape
    made = nn.Linear(n, m, bias=bias, dtype=dtype)
    for index, param in enumerate(made.parameters()):
        param.data = randn(*param.shape, seed=seed + index, dtype=dtype)
    return made


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stirred(module: FactoredLinear, seed: int = 50) -> FactoredLinear:
    """With factors that are not zero."""
    with torch.no_grad():
        module.B.copy_(randn(*module.B.shape, seed=seed))
        module.A.copy_(randn(*module.A.shape, seed=seed + 1))
    return module


def made(
    name: str, shape: tuple[int, int], *, bias: bool = False, dtype: torch.dtype = F64, **fields: Any
) -> FactoredLinear:
    """A layer of that parametrization with factors that are not zero."""
    start = linear(shape, bias=bias, dtype=dtype)
    return stirred(parametrization(name, **fields).wrap(start, generator()))


def product(module: FactoredLinear) -> Tensor:
    return module.B.detach().double() @ module.A.detach().double()


def net(*sizes: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers called 0, 2, 4 ... with tanh between them."""
    parts: list[nn.Module] = []
    for index, (n, m) in enumerate(itertools.pairwise(sizes)):
        parts += [linear((m, n), bias=bias, dtype=dtype, seed=10 * index), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


def close(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


class Watch(TorchDispatchMode):
    """The largest result of any operation, and the sizes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, list[tuple[int, int, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            one, other = args[-2:]
            self.products.append((*one.shape, other.shape[1]))
        assert func.overloadpacket is not torch.ops.aten.bmm
        return out


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@shapes
@names
def test_gradients(name: str, shape: tuple[int, int], bias: bool) -> None:
    module = made(name, shape, bias=bias)
    trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
    x = randn(2, 2, shape[1], seed=9).requires_grad_()
    # the function is a polynomial of degree 2 in each: differences are exact but for rounding, far below 1e-5
    assert gradcheck(
        lambda x, *p: functional_call(module, dict(zip(trained, p, strict=True)), x), (x, *trained.values())
    )


@shapes
@names
def test_forward_is_the_dense_layers(name: str, shape: tuple[int, int]) -> None:
    module, x = made(name, shape, bias=True), randn(2, 5, shape[1], seed=9)
    close(module(x), F.linear(x, layers.weight(module), module.bias))
    close(module(x[0, 0]), F.linear(x[0, 0], layers.weight(module), module.bias))
    assert module(x[:, :0]).shape == (2, 0, shape[0])


def scattered(module: Any) -> Tensor:
    """`scale B A + S` in operations that autograd knows."""
    m, n = module.out_features, module.in_features
    sparse = torch.zeros(m * n, dtype=F64).scatter(0, module.indices.long(), module.values)
    return module.scale * (module.B @ module.A) + sparse.view(m, n)


@pytest.mark.parametrize("tile", [1, 40, 1 << 20], ids=["rows", "tiles", "whole"])
@shapes
def test_gradients_are_the_dense_layers(shape: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TILE, tile)
    module: Any = made("sltrain", shape, bias=True)
    assert len(module.tiles()) == {1: shape[0], 1 << 20: 1}.get(tile, -(-shape[0] // (40 // shape[1])))
    grads = []
    for dense in (False, True):
        x = randn(3, 4, shape[1], seed=9).requires_grad_()
        y = F.linear(x, scattered(module), module.bias) if dense else module(x)
        wanted = [x, *module.parameters()]
        grads.append([y.detach(), *torch.autograd.grad((y.sin() * y).sum(), wanted)])
    for ours, autograds in zip(*grads, strict=True):
        close(ours, autograds, 1e-11)


def test_gradients_of_an_input_that_wants_none() -> None:
    module, x = made("sltrain", (14, 6)), randn(5, 6)
    module(x).sum().backward()
    expected = torch.autograd.grad(F.linear(x, scattered(module)).sum(), list(module.parameters()))
    for param, grad in zip(module.parameters(), expected, strict=True):
        assert param.grad is not None
        close(param.grad, grad)
    assert x.grad is None


def test_frozen_factors_get_no_gradient() -> None:
    module = made("sltrain", (14, 6))
    module.A.requires_grad_(False)
    module(randn(5, 6)).sum().backward()
    assert module.A.grad is None and module.B.grad is not None


@pytest.mark.parametrize("how", ["autocast", "bf16"])
@names
def test_half_precision(name: str, how: str) -> None:
    """The dtypes that `nn.Linear` gives, and its numbers to bf16's rounding.

    2^-9 each of inputs, weight, inner product, output; of a sum of some twenty terms of either sign: 2 % of the norm.
    """
    dtype = torch.float32 if how == "autocast" else BF16
    module = made(name, (24, 20), bias=True, dtype=dtype)
    dense, x = layers.merge(copy.deepcopy(module)), randn(7, 20, seed=9, dtype=dtype)
    results = []
    for layer in (module, dense):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", BF16, enabled=how == "autocast"):
            y = layer(inputs)
        (y.float() ** 2).sum().backward()
        results.append((y.detach(), inputs.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).float().norm()) < 0.02 * float(theirs.float().norm())
    for param in module.parameters():
        assert param.grad is None or param.grad.dtype == dtype
    exact = made(name, (24, 20), bias=True)
    for ours, wide in zip(module.parameters(), exact.parameters(), strict=True):
        wide.data = ours.detach().double()
    (exact(x.double()) ** 2).sum().backward()
    for (key, ours), wide in zip(module.named_parameters(), exact.parameters(), strict=True):
        if ours.grad is not None and wide.grad is not None:
            error = float((ours.grad.double() - wide.grad).norm() / wide.grad.norm())
            assert error < 0.02, key


# ---- SLTrain's sparse part -------------------------------------------------------------------------------------------


def test_indices_are_int32() -> None:
    model = net(20, 30)
    layers.apply(model, SLTrain(rank=2, density=0.1))
    (indices,) = model.buffers()
    assert indices.dtype is torch.int32 and model.state_dict()["0.indices"].dtype is torch.int32
    assert model.to(BF16)[0].indices.dtype is torch.int32


@pytest.mark.parametrize("density", [0.03, 0.5, 0.999, 1.0])
@shapes
def test_support(shape: tuple[int, int], density: float) -> None:
    module: Any = made("sltrain", shape, density=density)
    entries, indices = shape[0] * shape[1], module.indices
    assert len(indices) == len(module.values) == int(density * entries)
    assert bool((indices.diff() > 0).all())  # sorted, none twice
    assert int(indices[0]) >= 0 and int(indices[-1]) < entries
    assert density < 1 or len(indices) == entries


def test_support_is_uniform() -> None:
    """Each of 12 places in half of 400 layers: 200 with a deviation of 10, five of which is once in 10^6."""
    counts = torch.zeros(12)
    for seed in range(400):
        module = SLTrain(rank=1, density=0.5).wrap(linear((3, 4)), generator(seed))
        counts[module.indices.long()] += 1
    assert float((counts - 200).abs().max()) < 50, counts


def test_random_numbers_depend_on_seed_and_name_alone() -> None:
    """Not on the global generator, which does not move, nor on what else is replaced, nor on the dtype."""

    def drawn(seed: int = 0, ambient: int = 0, targets: str = "", dtype: torch.dtype = torch.float32) -> Tensor:
        model = net(6, 8, 6, dtype=dtype)
        torch.manual_seed(ambient)
        before = torch.get_rng_state()
        layers.apply(model, SLTrain(rank=2, density=0.4), targets, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([t.reshape(-1).double() for t in (model[2].indices, model[2].A, model[2].values)])

    assert torch.equal(drawn(), drawn(ambient=7))
    assert torch.equal(drawn(), drawn(targets="2"))
    assert torch.equal(drawn(), drawn(dtype=F64))
    assert not torch.equal(drawn()[:19], drawn(seed=1)[:19])
    model = net(8, 8, 8)
    layers.apply(model, SLTrain(rank=2, density=0.4))
    assert not torch.equal(model[0].indices, model[2].indices)


def test_the_weight_is_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is its gradient; and of the products with all the tokens there are a dense layer's three, each made once."""
    monkeypatch.setattr(TILE, 1000)
    m, n, rank, tokens = 96, 80, 5, 37
    module: Any = made("sltrain", (m, n), rank=rank, density=0.05)
    x = randn(tokens, n).requires_grad_()
    assert len(module.tiles()) == 8
    with Watch() as watch:
        module(x).sum().backward()
    assert watch.largest < m * n / 2
    multiplications = [a * b * c for a, b, c in watch.products if tokens in (a, b, c)]
    assert sum(multiplications) == 3 * tokens * m * n
    others = [a * b * c for a, b, c in watch.products if tokens not in (a, b, c)]
    assert sum(others) == 4 * rank * m * n  # the weight twice, the gradients of both factors


def test_low_rank_products_never_form_the_weight() -> None:
    module, x = made("low-rank", (96, 80), rank=5), randn(37, 80).requires_grad_()
    with Watch() as watch:
        module(x).sum().backward()
    assert watch.largest <= 37 * 96


def test_tiles_follow_the_indices_that_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TILE, 24)
    one, two = (SLTrain(rank=2, density=0.3).wrap(linear((14, 6)), generator(seed)) for seed in (0, 1))
    x = randn(3, 6)
    assert not torch.equal(one(x), two(x))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x)) and one.tiles() == two.tiles()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SLTrain(density=0.0), "density is 0.0; allowed: 0 < density <= 1"),
        (lambda: SLTrain(density=1.5), "density is 1.5"),
        (lambda: LowRank(rank=0), "low-rank: rank is 0; allowed: an integer >= 1"),
        (lambda: LORO(rank=-1), "loro: rank is -1"),
        (lambda: ReLoRA(alpha=0.0), "alpha is 0.0; allowed: finite numbers > 0"),
        (lambda: LowRank(alpha=float("inf")), "alpha is inf"),
        (lambda: LowRank(init="spectrall"), "did you mean 'spectral'"),  # pyright: ignore
        (lambda: SLTrain(rank=2, density=0.01).wrap(linear((4, 4)), generator()), "0 sparse entries at density 0.01"),
    ],
)
def test_bad_values_are_one_line(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ---- into a model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@names
def test_what_is_kept_of_a_layer(name: str, dtype: torch.dtype) -> None:
    model = net(6, 8, 6, dtype=dtype)
    model[2].eval()
    biases = [model[0].bias, model[2].bias]
    assert layers.apply(model, parametrization(name)) == ["0", "2"]
    assert [model[0].bias, model[2].bias] == biases and model[0].bias is biases[0]
    assert model[0].training and not model[2].training
    assert all(p.dtype is dtype for p in model.parameters())
    assert [type(layer) for _, layer in layers.factored(model)] == [type(model[0])] * 2
    assert (model[0].in_features, model[0].out_features) == (6, 8)
    assert "rank=3" in repr(model)


@pytest.mark.parametrize("name", ["lora", "relora"])
def test_lora_starts_as_the_dense_model(name: str) -> None:
    model, x = net(6, 8, 6), randn(4, 6, dtype=torch.float32)
    before = model(x)
    layers.apply(model, parametrization(name))
    assert torch.equal(model(x), before)
    assert not model[0].base.requires_grad and torch.equal(model[0].base, net(6, 8, 6)[0].weight)


def test_targets() -> None:
    for targets, expected in [("", ["0", "2", "4"]), (r"^[02]$", ["0", "2"]), (["4", "0"], ["0", "4"])]:
        model = net(6, 8, 6, 7)
        assert layers.apply(model, LowRank(rank=2), targets) == expected
        assert [name for name, _ in layers.factored(model)] == expected


def test_a_target_that_matches_nothing_names_the_layers() -> None:
    model = net(6, 8, 6)
    with pytest.raises(UserError, match=r"target 'mlp' matches no hidden linear layer; known: 0, 2$"):
        layers.apply(model, LowRank(rank=2), ["0", "mlp"])
    assert not list(layers.factored(model))


def test_a_rank_too_large_names_the_layer_and_leaves_the_model() -> None:
    model = net(9, 9, 4)
    known = r"rank is 5, too much for 1 layers, such as 2 of shape \(4, 9\); allowed: 1 to 4, or .* '\(0\)\$'"
    with pytest.raises(UserError, match=known):
        layers.apply(model, LowRank(rank=5))
    assert not list(layers.factored(model))


def test_a_target_that_is_no_regular_expression() -> None:
    with pytest.raises(UserError, match=r"layers: target: '\(\[' is not a regular expression: unterminated"):
        layers.apply(net(6, 8, 6), LowRank(rank=2), "([")


def test_a_second_time() -> None:
    model = net(6, 8, 6)
    layers.apply(model, LowRank(rank=2))
    with pytest.raises(UserError, match="has only low-rank layers to replace"):
        layers.apply(model, LowRank(rank=2))


@names
def test_a_frozen_layer_stays_frozen_but_for_adapters(name: str) -> None:
    model = nn.Sequential(linear((6, 6))).requires_grad_(False)
    layers.apply(model, parametrization(name))
    trained = {key for key, p in model[0].named_parameters() if p.requires_grad}
    assert trained == ({"B", "A"} if name in ("lora", "relora") else set())


@names
def test_a_model_may_read_the_weight(name: str) -> None:
    """As `nn.TransformerEncoderLayer` does, for its fast path; the gradient goes through."""
    module = stirred(made(name, (14, 6)))
    x = randn(4, 6)
    close(F.linear(x, module.weight, module.bias), module(x), 1e-12)
    trained = [p for p in module.parameters() if p.requires_grad]
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), trained) for y in (F.linear(x, module.weight, module.bias), module(x))
    )
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other, 1e-10)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Tanh()), nn.Sequential(nn.Embedding(5, 5))])
def test_a_model_without_linear_layers(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"Sequential has no hidden nn\.Linear to replace"):
        layers.apply(model, LowRank(rank=2))


@names
def test_a_layer_in_two_places_stays_one(name: str) -> None:
    shared = linear((6, 6), dtype=torch.float32)
    model = nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared))
    plain = nn.Sequential(linear((6, 6)), nn.Tanh(), nn.Sequential(linear((6, 6)))).float()
    assert layers.apply(model, parametrization(name)) == ["0"]
    assert model[0] is model[2][0] and isinstance(model[0], FactoredLinear)
    stirred(model[0])
    x = randn(4, 6, dtype=torch.float32)
    plain.load_state_dict(layers.dense_state_dict(model))
    # fp32's rounding of some six products
    close(plain(x), model(x), 1e-4)
    layers.merge_all(model)
    assert model[0] is model[2][0] and type(model[0]) is nn.Linear


def test_layers_that_share_a_weight() -> None:
    model = nn.Sequential(linear((6, 6)), nn.Tanh(), linear((6, 6)))
    model[2].weight = model[0].weight
    with pytest.raises(UserError, match="layers: 0 and 2 share one weight, which factors would not; leave both out"):
        layers.apply(model, LowRank(rank=2))


def test_a_layer_is_no_model_to_merge() -> None:
    with pytest.raises(UserError, match=r"LowRankLinear is a layer, not a model; layers\.merge returns its dense one"):
        layers.merge_all(LowRank(rank=2).wrap(linear((6, 6)), generator()))


def test_loro_keeps_its_precision_in_fp32() -> None:
    """Of ill-conditioned factors too: inverting a Gram matrix would square the 100, and lose 6e-4 of the weight."""
    torch.manual_seed(0)
    b, a = torch.randn(40, 8), torch.randn(8, 24)
    b[:, -1] /= 100
    steps = 0.01 * torch.randn(40, 8), 0.01 * torch.randn(8, 24)
    exact = dense_loro_step(b.double(), a.double(), steps[0].double(), steps[1].double())
    new_b, new_a = exact_step(b, a, *steps)
    # some thirty of fp32's 6e-8, from two QRs, an SVD and products
    assert (new_b.double() @ new_a.double() - exact).norm() < 2e-6 * exact.norm()


@names
def test_a_single_layer_is_no_model(name: str) -> None:
    """There is nothing to put another in its place."""
    with pytest.raises(UserError):
        layers.apply(linear((6, 6)), parametrization(name))


@pytest.fixture(scope="module")
def llama(tiny: Path) -> Callable[..., Any]:
    """Makes a Llama of 36,000 parameters."""

    def make(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
        return build_model(resolve_config(str(tiny / "config.json")), dtype=dtype, device=device, seed=0)

    return make


@names
def test_llama_keeps_embeddings_and_head(llama: Callable[..., Any], name: str) -> None:
    model = llama()
    replaced = layers.apply(model, parametrization(name))
    assert len(replaced) == 14 and all(".self_attn." in layer or ".mlp." in layer for layer in replaced)
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize("init", ["paper", "spectral"])
@names
def test_meta_device(llama: Callable[..., Any], name: str, init: str) -> None:
    """Shapes and dtypes without memory: the same as on a real one."""
    if init == "spectral" and "init" not in PARAMETRIZATIONS[name].__dataclass_fields__:
        pytest.skip("this parametrization has one init")
    states = []
    for device in ("meta", "cpu"):
        model = llama(BF16, device)
        layers.apply(model, parametrization(name, init=init))
        states.append({key: (t.shape, t.dtype) for key, t in model.state_dict().items()})
        assert all(
            p.device.type == device
            for p in (*model.parameters(), *dict(layers.factored(model))["model.layers.0.mlp.up_proj"].buffers())
        )
    assert states[0] == states[1]


@shapes
@pytest.mark.parametrize("name", ["low-rank", "sltrain"])
def test_spectral_start(name: str, shape: tuple[int, int]) -> None:
    """The best approximation of the dense start, by balanced factors; the values are what it misses at their places."""
    dense = linear(shape)
    module: Any = parametrization(name, init="spectral").wrap(dense, generator())
    u, s, vh = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vh[:3]
    close(module.scale * product(module), best)
    close(module.B.mT @ module.B, module.A @ module.A.mT)
    close(module.scale * module.B.mT @ module.B, s[:3].diag())
    if name == "sltrain":
        close(module.values, (dense.weight - best).view(-1)[module.indices])


@shapes
@pytest.mark.parametrize("name", ["low-rank", "sltrain"])
def test_full_rank_spectral_start_is_the_dense_layer(name: str, shape: tuple[int, int]) -> None:
    dense, x = linear(shape, bias=True), randn(5, shape[1], seed=9)
    module = parametrization(name, init="spectral", rank=min(shape)).wrap(dense, generator())
    close(module(x), dense(x))


@pytest.mark.parametrize(("n", "rank", "std"), [(512, 128, 3.7e-3), (2048, 512, 4.6e-4)], ids=["60m", "1b"])
def test_the_papers_start_is_as_small_as_said(n: int, rank: int, std: float) -> None:
    """Estimated from r n numbers whose squares deviate by 0.9 of their mean: 0.4 % at most. `std` has two digits."""
    module = LowRank(rank=rank, alpha=32).wrap(linear((512, n), dtype=torch.float32), generator())
    measured = float(layers.weight(module).std())
    assert measured == pytest.approx(32 / (3 * rank * n**0.5), rel=0.01)
    assert measured == pytest.approx(std, rel=0.02)


def test_other_starts() -> None:
    """U(+-b) has the deviation b / sqrt(3); of 10^4 numbers that is within 1 %, and so is the largest of b."""
    dense, bound = linear((200, 100), dtype=torch.float32), 100**-0.5
    for name in ("sltrain", "lora", "relora"):
        module: Any = parametrization(name, rank=100).wrap(dense, generator())
        assert not bool(module.B.any())
        drawn = [module.A] + ([module.values] if name == "sltrain" else [])
        for tensor in drawn:
            assert float(tensor.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.03)
            assert 0.99 * bound < float(tensor.detach().abs().max()) <= bound
    loro = LORO(rank=100).wrap(dense, generator())
    for factor in (loro.B, loro.A):  # Xavier
        assert float(factor.detach().std()) == pytest.approx((2 / sum(factor.shape)) ** 0.5, rel=0.03)


# ---- out of a model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@shapes
@names
def test_merge(name: str, shape: tuple[int, int], bias: bool) -> None:
    module, x = made(name, shape, bias=bias).eval(), randn(5, shape[1], seed=9)
    dense = layers.merge(module)
    assert type(dense) is nn.Linear and not dense.training and dense.bias is module.bias
    assert (dense.in_features, dense.out_features) == (shape[1], shape[0])
    assert dense.weight.requires_grad
    close(dense(x), module(x))


@names
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_what_was_frozen_is_merged_frozen(name: str, trained: bool) -> None:
    """An adapter beside a frozen layer is trained; the layer that they become is not."""
    model = net(6, 8, 6).requires_grad_(trained)
    layers.apply(model, parametrization(name))
    layers.merge_all(model)
    assert {p.requires_grad for p in model.parameters()} == {trained}


@names
def test_merge_all_is_the_way_back(name: str) -> None:
    model, x = net(6, 8, 6, dtype=F64), randn(4, 6)
    kinds = [type(part) for part in model]
    layers.apply(model, parametrization(name))
    for _, module in layers.factored(model):
        stirred(module)
    before = model(x)
    state = layers.dense_state_dict(model)
    assert layers.merge_all(model) == ["0", "2"]
    assert [type(part) for part in model] == kinds
    close(model(x), before)
    assert state.keys() == model.state_dict().keys() == net(6, 8, 6).state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert layers.merge_all(model) == []


@names
def test_bf16_is_merged_with_one_rounding(name: str) -> None:
    module = made(name, (24, 20), dtype=BF16)
    exact = module.scale * product(module)
    rest = module.rest()
    exact = exact if rest is None else exact + rest.double()
    # fp32 in between may turn a number that is nearly half way: one in some thousands
    assert float((layers.weight(module) != exact.to(BF16)).double().mean()) < 0.01
    assert layers.weight(module).dtype is BF16


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@names
def test_transformers_loads_what_is_saved(
    llama: Callable[..., Any], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    model = llama(dtype).eval()
    layers.apply(model, parametrization(name))
    for index, (_, module) in enumerate(layers.factored(model)):
        with torch.no_grad():
            stirred(module, seed=index).B.mul_(0.02)
    model.save_pretrained(tmp_path, state_dict=layers.dense_state_dict(model))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype is dtype and type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits.double(), loaded.eval()(input_ids=ids).logits.double()
    # two products instead of one, some twenty roundings deep: 2^-24 and 2^-9 each
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    assert float((ours - theirs).norm()) < tolerance * float(ours.norm())


# ---- refactorization -------------------------------------------------------------------------------------------------


def relative(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


def skewed(shape: tuple[int, int], dtype: torch.dtype, name: str = "low-rank", rank: int = 5) -> FactoredLinear:
    """Factors far from balance: columns of B from 100 to 0.01."""
    module = made(name, shape, rank=rank, dtype=dtype)
    with torch.no_grad():
        module.B.mul_(torch.logspace(2, -2, rank, dtype=F64).to(dtype))
    return module


def balanced(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


@shapes
@names
def test_refactorize_keeps_the_product_and_balances(name: str, shape: tuple[int, int]) -> None:
    module = skewed(shape, F64, name)
    before, values = product(module), torch.linalg.svdvals(product(module))[:5]
    kept = {key: value.clone() for key, value in module.state_dict().items() if key not in "AB"}
    done = layers.refactorize(module)
    close(product(module), before, 1e-11)  # of a product of norm 500
    close(module.B.mT @ module.B, values.diag(), 1e-10)
    close(module.A @ module.A.mT, values.diag(), 1e-10)
    assert float(done.change) < 1e-14
    state = module.state_dict()
    assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype for key, value in kept.items())


@shapes
def test_refactorize_in_fp32(shape: tuple[int, int]) -> None:
    module = skewed(shape, torch.float32)
    before = product(module)
    change = float(layers.refactorize(module).change)
    assert relative(product(module), before) < 1e-5
    # both are some roundings of 6e-8: the report can say no more
    assert change == pytest.approx(relative(product(module), before), abs=1e-6)


@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64)], ids=SHAPES)
def test_refactorize_in_bf16_costs_one_rounding(shape: tuple[int, int]) -> None:
    """What rounding the exact balanced factors costs, which depends on their signs and on ties: 5 % more or less."""
    module = skewed(shape, BF16, rank=8)
    before = product(module)
    b, a = (factor.to(BF16).double() for factor in balanced(before, 8))
    floor = relative(b @ a, before)
    change = float(layers.refactorize(module).change)
    assert 1e-3 < floor < 4e-3 and relative(product(module), before) < 1.05 * floor
    assert change == pytest.approx(relative(product(module), before), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_refactorize_does_not_drift(dtype: torch.dtype) -> None:
    """Twenty times: as far as twenty independent roundings go at most, sqrt(20) = 4.5 times one."""
    module = skewed((96, 40), dtype, rank=8)
    before = product(module)
    layers.refactorize(module)
    once = relative(product(module), before)
    for _ in range(19):
        layers.refactorize(module)
    assert relative(product(module), before) < (1e-5 if dtype is torch.float32 else 4.5 * once)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["fp32", "fp64"])
@shapes
def test_a_lost_direction_can_be_trained_again(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """A product of rank 2 in factors of rank 4: two columns of B are rounding, whose rows of A are not."""
    module = made("low-rank", shape, rank=4, dtype=dtype)
    with torch.no_grad():
        module.B[:, 2] = 0
        module.B[:, 3] = module.B[:, 1]
        module.A[2] = 0
        module.A[3] = 2 * module.A[1]
    before = product(module)
    layers.refactorize(module)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    assert relative(product(module), before) < tolerance
    rows, columns = module.A.detach().norm(dim=1), module.B.detach().norm(dim=0)
    assert bool((columns[2:] < tolerance * columns[0]).all()) and bool((rows[2:] > 0).all())
    assert torch.allclose(rows[2:], rows[1].expand(2), rtol=1e-5)  # the smallest one that counts
    angles = F.normalize(module.A.detach())
    close(angles @ angles.mT, torch.eye(4, dtype=dtype), tolerance)
    module(randn(6, shape[1], dtype=dtype)).square().sum().backward()
    assert module.B.grad is not None and bool((module.B.grad.norm(dim=0) > 0).all())


@shapes
def test_small_singular_values_are_kept(shape: tuple[int, int]) -> None:
    """From 1 down to 1e-6, in fp32: each side of what counts, nothing of the product is lost."""
    rank = min(shape)
    q = [torch.linalg.qr(randn(side, rank))[0] for side in shape]
    spread = torch.logspace(0, -6, rank, dtype=torch.float64)
    module = LowRank(rank, alpha=rank).wrap(linear(shape, dtype=torch.float32), generator())
    with torch.no_grad():
        module.B.copy_(q[0] * spread)
        module.A.copy_(q[1].mT)
    before = product(module)
    change = float(layers.refactorize(module).change)
    # a few of fp32's 6e-8
    assert relative(product(module), before) < 2e-6 and change < 2e-6


@names
def test_a_zero_product_is_left_alone(name: str) -> None:
    module = made(name, (14, 6))
    with torch.no_grad():
        module.B.zero_()
    a = module.A.detach().clone()
    done = layers.refactorize(module)
    assert not bool(module.B.any()) and torch.equal(module.A, a) and float(done.change) == 0


@pytest.mark.parametrize(("of_b", "of_a"), [(1e15, 1e-15), (1e-18, 1e18), (1e8, 1e8), (1e-8, 1e-8), (1e30, 1e-30)])
def test_huge_and_tiny_factors(of_b: float, of_a: float) -> None:
    module = made("low-rank", (14, 6), dtype=torch.float32)
    with torch.no_grad():
        module.B.mul_(of_b)
        module.A.mul_(of_a)
    before = product(module)
    done = layers.refactorize(module)
    assert relative(product(module), before) < 1e-5 and float(done.change) < 1e-5
    sizes = module.B.detach().double().norm(), module.A.detach().double().norm()
    assert float(sizes[0]) == pytest.approx(float(sizes[1]), rel=1e-5)


@pytest.mark.parametrize("name", ["low-rank", "sltrain", "loro"])
def test_a_restart_forms_no_large_matrix(name: str) -> None:
    module = made(name, (96, 80), rank=4, density=0.05)
    module.remember()
    with torch.no_grad():
        module.B.add_(randn(96, 4, seed=3))
    with Watch() as watch:
        module.restart(generator())
    assert watch.largest <= 96 * 8


# ---- ReLoRA and LORO -------------------------------------------------------------------------------------------------


def least_squares(module: nn.Module, shape: tuple[int, int], steps: int) -> None:
    """Some steps towards a random target."""
    target, x = randn(*shape, seed=70), randn(40, shape[1], seed=71)
    opt = gossamer.Optimizer([p for p in module.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        opt.zero_grad()
        (module(x) - x @ target.mT).square().mean().backward()
        opt.step()


@shapes
def test_relora_moves_and_merges(shape: tuple[int, int]) -> None:
    """From the first step on; each merge keeps the function and the sum of two has rank 2 r."""
    module: Any = ReLoRA(rank=2, alpha=3).wrap(linear(shape), generator())
    start = module.base.detach().clone()
    for round_ in (1, 2):
        a = module.A.detach().clone()
        least_squares(module, shape, 10)
        assert bool((module.B != 0).all()) and bool((a != module.A).all())
        weight, a = layers.weight(module), module.A.detach().clone()
        done = module.restart(generator(round_))
        close(module.base.detach(), weight)
        assert not bool(module.B.any()) and bool((a != module.A).all())
        assert float(module.A.detach().abs().max()) <= shape[1] ** -0.5
        assert float(done.change) < 1e-15
        rank = int((torch.linalg.svdvals(module.base.detach() - start) > 1e-9).sum())
        assert rank == 2 * round_
    assert not module.base.requires_grad


def test_relora_draws_from_its_generator() -> None:
    fresh = []
    for ambient, seed in ((1, 5), (2, 5), (1, 6)):
        module = made("relora", (14, 6), dtype=BF16)
        torch.manual_seed(ambient)
        module.restart(generator(seed))
        fresh.append({key: value.clone() for key, value in module.state_dict().items()})
    assert all(torch.equal(fresh[0][key], fresh[1][key]) for key in fresh[0])
    assert not torch.equal(fresh[0]["A"], fresh[2]["A"]) and not torch.equal(fresh[0]["base"], fresh[2]["base"])


def test_relora_in_bf16_loses_no_small_product() -> None:
    """A product 1/1000 of the weight: rounding to nearest would drop it; the mean of 4000 entries has it to 10 %.

    An entry rounds by up to 2^-8 of itself, some 3 products: over sqrt(4096) that is 5 % of one.
    """
    module: Any = ReLoRA(rank=1, alpha=1).wrap(nn.Linear(64, 64, bias=False, dtype=BF16), generator())
    with torch.no_grad():
        module.base.fill_(1.0)
        module.B.fill_(1.0)
        module.A.fill_(2.0**-10)
    done = module.restart(generator())
    assert float(module.base.float().mean() - 1) == pytest.approx(2.0**-10, rel=0.15)
    assert float(done.change) < 2**-8


def best(dense: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def dense_loro_step(b: Tensor, a: Tensor, step_b: Tensor, step_a: Tensor) -> Tensor:
    """Section 3 of the LORO paper with everything m x n: `W - dW`, and the nearest matrix of rank r."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    x = step_b @ torch.linalg.inv(r_a)
    y = (torch.linalg.inv(r_b).mT @ step_a).mT
    d_w = q_b @ y.mT + (x - q_b @ (q_b.mT @ x)) @ q_a.mT
    return best(b @ a - d_w, b.shape[1])


RANKS = pytest.mark.parametrize("rank", [1, 2, 4, 6], ids=lambda rank: f"rank{rank}")


@RANKS
@shapes
def test_loro_steps_exactly(shape: tuple[int, int], rank: int) -> None:
    """Also with weight decay: the step is whatever the optimizer took. 1e-8: fp64 times the conditions of B and A."""
    module: Any = stirred(LORO(rank=rank).wrap(linear(shape), generator()))
    opt = gossamer.Optimizer(module.parameters(), lr=0.1, weight_decay=0.5)
    x = randn(8, shape[1], seed=8)
    for _ in range(3):
        opt.zero_grad()
        module(x).sin().sum().backward()
        module.remember()
        b, a = module.B.detach().clone(), module.A.detach().clone()
        opt.step()
        steps = b - module.B.detach(), a - module.A.detach()
        done = module.restart(generator())
        expected = dense_loro_step(b, a, *steps)
        close(product(module), expected, 1e-8)
        close(module.B.mT @ module.B, module.A @ module.A.mT, 1e-8)
        assert float(done.change) == pytest.approx(relative(expected, b @ a), rel=1e-6)
        assert module.before is None


@RANKS
@shapes
def test_loro_of_a_gradient_step_is_riemannian_descent(shape: tuple[int, int], rank: int) -> None:
    """Steps `h dL/dB, h dL/dA` mean the gradient G projected on the tangent space, `h (P G + G Q - P G Q)`.

    With rank = min(m, n) that is G itself, and the step is the dense layer's.
    """
    b, a, g, h = randn(shape[0], rank, seed=1), randn(rank, shape[1], seed=2), randn(*shape, seed=3), 0.1
    new_b, new_a = exact_step(b, a, h * g @ a.mT, h * b.mT @ g)
    p, q = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
    close(new_b @ new_a, best(b @ a - h * (p @ g + g @ q - p @ g @ q), rank), 1e-9)
    if rank == min(shape):
        close(new_b @ new_a, b @ a - h * g, 1e-9)


@shapes
def test_loro_with_a_step_that_leaves_a_column_alone(shape: tuple[int, int]) -> None:
    """The new directions are then fewer than r, and must still be orthogonal to the old ones for the SVD to be one."""
    b, a = randn(shape[0], 3, seed=1), randn(3, shape[1], seed=2)
    for column in range(3):
        step_b, step_a = randn(shape[0], 3, seed=3), randn(3, shape[1], seed=4)
        step_b[:, column] = 0
        step_a[column] = 0
        new_b, new_a = exact_step(b, a, step_b, step_a)
        close(new_b @ new_a, dense_loro_step(b, a, step_b, step_a), 1e-8)


def test_loro_with_a_lost_direction_stays_finite() -> None:
    b, a = randn(14, 3, seed=1), randn(3, 6, seed=2)
    b[:, 1], a[2] = 0, 0
    new_b, new_a = exact_step(b.float(), a.float(), randn(14, 3).float(), randn(3, 6).float())
    assert bool(new_b.isfinite().all()) and bool(new_a.isfinite().all())


def test_loro_without_a_step_changes_nothing() -> None:
    module = made("loro", (14, 6))
    module.remember()
    before = product(module)
    assert float(module.restart(generator()).change) < 1e-14
    close(product(module), before)


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(14, 6), (9, 9)], ids=["tall", "square"])
def test_with_one_factor_held_at_the_identity_it_is_the_dense_layer(shape: tuple[int, int]) -> None:
    """Scale 1, A = I, B = W: the same bits through thirty steps of AdamW with weight decay."""
    m, n = shape
    dense = linear(shape, bias=True)
    module = LowRank(rank=n, alpha=n).wrap(linear(shape, bias=True), generator())
    with torch.no_grad():
        module.B.copy_(dense.weight)
        module.A.copy_(torch.eye(n))
    module.A.requires_grad_(False)
    optimizers = [
        gossamer.Optimizer(gossamer.param_groups(nn.Sequential(layer), gossamer.AdamW()), lr=0.05, weight_decay=0.1)
        for layer in (module, dense)
    ]
    for step in range(30):
        x, y = randn(8, n, seed=step), randn(8, m, seed=100 + step)
        for layer, opt in zip((module, dense), optimizers, strict=True):
            opt.zero_grad()
            (layer(x) - y).square().mean().backward()
            opt.step()
        assert torch.equal(module.B, dense.weight) and torch.equal(module.bias, dense.bias)


@shapes
def test_full_rank_reaches_the_dense_minimum(shape: tuple[int, int]) -> None:
    """Least squares from the dense layer's own start, 1.5 away; after 300 steps of a falling rate 0.5 % is left.

    What is left is Adam's slowest direction; a rank of one less than full could not come as near.
    """
    m, n = shape
    x = randn(60, n, seed=1)
    y = x @ randn(n, m, seed=2) + randn(60, m, seed=3)
    minimum = torch.linalg.lstsq(x, y).solution.mT
    module = LowRank(rank=min(shape), alpha=min(shape), init="spectral").wrap(linear(shape), generator())
    opt = gossamer.Optimizer(gossamer.param_groups(nn.Sequential(module), gossamer.AdamW()), lr=0.1)
    start = relative(layers.weight(module), minimum)
    for step in range(300):
        opt.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        opt.zero_grad()
        (module(x) - y).square().mean().backward()
        opt.step()
    assert start > 1 and relative(layers.weight(module), minimum) < 0.005
    assert relative(best(minimum, min(shape) - 1), minimum) > 0.005


# ---- with the optimizer ----------------------------------------------------------------------------------------------


def sorted_by_name(model: nn.Module, method: Any, **options: Any) -> dict[str, tuple[str, str, float | None]]:
    """Method, reason and own learning rate of every parameter that is trained."""
    groups = gossamer.param_groups(model, method, **options)
    return {
        name: (type(group["method"]).__name__, why, group.get("lr"))
        for group in groups
        for name, why in zip(group["param_names"], group["why"], strict=True)
    }


@names
def test_factors_are_hidden_matrices(name: str) -> None:
    model = net(20, 24)
    layers.apply(model, parametrization(name, rank=6))
    groups = sorted_by_name(model, gossamer.LoRAPre(rank=2), fallback_lr=1e-5)
    assert groups["0.B"] == groups["0.A"] == ("LoRAPre", "hidden matrix", None)
    assert groups["0.bias"] == ("AdamW", "1-D", 1e-5)
    expected = {"0.A", "0.B", "0.bias"} | ({"0.values"} if name == "sltrain" else set())
    assert groups.keys() == expected  # neither the frozen base of LoRA nor indices


def test_values_go_to_a_method_that_trains_vectors() -> None:
    """Else to the fallback; at the learning rate of hidden matrices either way."""
    model = net(20, 24)
    layers.apply(model, SLTrain(rank=6))
    matrices = sorted_by_name(model, gossamer.LoRAPre(rank=2), fallback_lr=1e-5)
    vectors = sorted_by_name(model, gossamer.Lion(), fallback_lr=1e-5)
    assert matrices["0.values"] == ("AdamW", "sparse values", None)
    assert vectors["0.values"] == ("Lion", "sparse values", None)


def test_factors_thinner_than_the_methods_rank_are_dense() -> None:
    model = net(20, 24)
    layers.apply(model, LowRank(rank=6))
    groups = sorted_by_name(model, gossamer.LoRAPre(rank=6), fallback_lr=1e-5)
    assert groups["0.B"] == ("AdamW", "rank >= min(m, n): dense", None)


@contextmanager
def no_ambient_random_numbers() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", list(gossamer.methods()))
@pytest.mark.parametrize("name", ["low-rank", "sltrain"])
def test_every_method_trains_factors_over_a_restart(name: str, method: str) -> None:
    known = gossamer.methods()[method].cls.__dataclass_fields__
    fields = {key: value for key, value in {"rank": 2, "update_proj_gap": 2}.items() if key in known}
    model = net(20, 24, 16)
    layers.apply(model, parametrization(name, rank=6))
    opt = gossamer.Optimizer(gossamer.param_groups(model, build(method, **fields)), lr=1e-2)
    assert {"0.B", "0.A", "2.B"} <= {row.name for row in opt.plan() if row.method == method}
    kept = {moment for row in opt.param_groups for moment in row["method"].init(torch.empty(24, 6, device="meta"))}
    reset: Any = "moments" if any(key.startswith("v") for key in kept) else "first"
    restarter = gossamer.Restarter(gossamer.Restarts(every=2, recovery_steps=1, reset=reset), model, opt)
    x, y = randn(10, 20, dtype=torch.float32), randn(10, 16, seed=1, dtype=torch.float32)
    restarted, start = [], {key: p.detach().clone() for key, p in model.named_parameters()}
    with no_ambient_random_numbers():
        for step in range(1, 4):
            opt.zero_grad()
            (model(x) - y).square().mean().backward()
            opt.step()
            assert all(bool(p.isfinite().all()) for p in model.parameters())
            restarted.append(restarter(step) is not None)
    assert restarted == [False, True, False]
    assert all(not torch.equal(p, start[key]) for key, p in model.named_parameters())
