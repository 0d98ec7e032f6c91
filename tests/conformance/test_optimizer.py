"""The driver: what it refuses, what it restores, how it writes bf16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gossamer
from gossamer import AdamMini, AdamW, LoRAPre, Optimizer, UserError, methods, param_groups
from gossamer.optim.rounding import stochastic_bf16


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape).to(dtype))


def step(opt: Optimizer, p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p)
    opt.step()


def one_line(error: pytest.ExceptionInfo[UserError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, ("lr is -1.0", ">= 0")),
        ({"weight_decay": -0.1}, ("weight_decay is -0.1",)),
        ({"rounding": "stochastc"}, ("'stochastic'?", "nearest")),
    ],
)
def test_bad_options(options: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        Optimizer([matrix(3, 3)], **options)
    one_line(error, *words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoRAPre(rank=0), ("rank is 0", ">= 1")),
        (lambda: LoRAPre(betas=(0.9, 1.0)), ("beta2 is 1.0",)),
        (lambda: AdamW(eps=-1.0), ("eps is -1.0",)),
        (lambda: LoRAPre(updates="sequental"), ("'sequential'?", "simultaneous")),  # pyright: ignore
        (lambda: LoRAPre(damping=-1.0), ("damping is -1.0",)),
    ],
)
def test_bad_hyperparameters(make, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        make()
    one_line(error, *words)


def test_sparse_and_complex_are_refused_by_name() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = Optimizer(param_groups(nn.Sequential(embedding), AdamW()))
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UserError) as error:
        opt.step()
    one_line(error, "'0.weight'", "sparse")
    with pytest.raises(UserError) as error:
        Optimizer([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
    one_line(error, "complex64")


def test_a_matrix_method_refuses_a_vector() -> None:
    with pytest.raises(UserError) as error:
        Optimizer([{"params": [matrix(3)], "method": LoRAPre(rank=1)}])
    one_line(error, "'group.0.0'", "1-D", "lora-pre", "param_groups")
    opt = Optimizer([matrix(3)])
    with pytest.raises(UserError):
        opt.add_param_group({"params": [matrix(4)], "method": LoRAPre(rank=1)})
    assert len(opt.param_groups) == 1  # a refused group leaves no trace


def test_parameters_without_gradient_are_skipped() -> None:
    a, b = matrix(3, 3), matrix(3, 3)
    before, opt = b.detach().clone(), Optimizer([a, b], weight_decay=0.1)
    step(opt, a)
    opt.zero_grad(set_to_none=True)
    opt.step()
    assert torch.equal(b, before) and b not in opt.state and float(opt.state[a]["step"]) == 1


def test_fp32_state_survives_over_bf16_weights() -> None:
    """torch's own load_state_dict would cast these factors to bf16."""
    p = matrix(12, 10, dtype=torch.bfloat16)
    opt = Optimizer([{"params": [p], "method": LoRAPre(rank=3)}])
    step(opt, p)
    clone = Optimizer([{"params": [p], "method": LoRAPre(rank=3)}])
    clone.load_state_dict(opt.state_dict())
    for key, value in opt.state[p].items():
        assert value.dtype is torch.float32 and torch.equal(clone.state[p][key], value)
        assert clone.state[p][key].dtype is torch.float32


def test_hyperparameters_come_from_the_checkpoint() -> None:
    p = matrix(6, 6)
    saved = Optimizer([{"params": [p], "method": LoRAPre(rank=2, eps=1e-5)}], lr=0.5, weight_decay=0.25)
    step(saved, p)
    opt = Optimizer([{"params": [p], "method": LoRAPre(rank=2)}])
    opt.load_state_dict(saved.state_dict())
    assert opt.param_groups[0]["method"] == LoRAPre(rank=2, eps=1e-5)
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"]) == (0.5, 0.25)


def test_old_checkpoint_without_a_newer_hyperparameter() -> None:
    p = matrix(6, 6)
    opt = Optimizer([{"params": [p], "method": LoRAPre(rank=2)}])
    step(opt, p)
    old = opt.state_dict()
    del old["param_groups"][0]["method"]["init_std"], old["param_groups"][0]["rounding"]
    opt.load_state_dict(old)
    assert opt.param_groups[0]["method"].init_std == 0.02 and opt.param_groups[0]["rounding"] == "stochastic"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"method": AdamW()}, ("'lora-pre'", "'adamw'")),
        ({"method": LoRAPre(rank=3)}, ("m_B", "(6, 2)", "(6, 3)", "rank")),
    ],
)
def test_a_checkpoint_of_another_method_or_rank(other: dict[str, object], words: tuple[str, ...]) -> None:
    p = matrix(6, 6)
    opt = Optimizer([{"params": [p], "method": LoRAPre(rank=2)}])
    step(opt, p)
    with pytest.raises(UserError) as error:
        Optimizer([{"params": [p], **other}]).load_state_dict(opt.state_dict())
    one_line(error, *words)


def test_a_checkpoint_of_another_library_is_named() -> None:
    p = matrix(6, 6)
    theirs = torch.optim.AdamW([p])
    step(theirs, p)
    with pytest.raises(UserError) as error:
        Optimizer([{"params": [p], "method": AdamW()}]).load_state_dict(theirs.state_dict())
    one_line(error, "a group has no 'method'", "gossamer.Optimizer")


def test_stochastic_rounding_is_unbiased_and_keeps_what_bf16_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(1000).bfloat16().float()
    assert torch.equal(stochastic_bf16(exact, generator).float(), exact)
    low, high = 1.0, 1.0078125  # neighbours in bf16
    x = torch.full((200_000,), 1.0 + 0.3 * (high - low))
    rounded = stochastic_bf16(x, generator).float()
    assert set(rounded.unique().tolist()) == {low, high}
    # the share that goes up is binomial with standard deviation 0.001: five of them
    assert float((rounded == high).float().mean()) == pytest.approx(0.3, abs=0.005)
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.3895e38, -3.3895e38])
    kept = stochastic_bf16(odd, generator).float()
    assert kept[:2].isinf().all() and kept[2].isnan() and kept[3:].isfinite().all()


@pytest.mark.parametrize(("rounding", "moves"), [("stochastic", True), ("nearest", False)])
def test_small_updates_of_bf16_weights(rounding: str, moves: bool) -> None:
    """1/1000 of the weight is below half a bf16 spacing: to nearest it is lost for ever, stochastically it is not."""
    p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    opt = Optimizer([p], lr=1e-3, rounding=rounding)
    for _ in range(20):
        step(opt, p)
    assert (p != 1).any() == moves
    if moves:  # Adam's steps of a constant gradient are lr each: 20 of them, up to the rounding noise of 4096 entries
        assert float(1 - p.float().mean()) == pytest.approx(0.02, rel=0.05)


def test_weight_decay_is_decoupled() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    opt = Optimizer([p], lr=0.1, weight_decay=0.5)
    p.grad = torch.zeros_like(p)
    opt.step()
    assert torch.allclose(p, torch.full((2, 2), 0.95))


def test_plan_prints_every_parameter_with_its_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2))
    plan = Optimizer(param_groups(model, LoRAPre(rank=4))).plan()
    text = str(plan)
    for name, _ in model.named_parameters():
        assert name in text
    assert "rank >= min(m, n): dense" in text and "hidden matrix" in text and "1-D" in text
    row = next(row for row in plan if row.name == "0.weight")
    assert row.state_bytes == 2 * (8 + 16) * 4 * 4 and row.rank == 4 and row.method == "lora-pre"


def test_lora_pre_state_is_two_m_plus_n_r_numbers() -> None:
    for m, n, r in [(64, 48, 8), (48, 64, 16), (5461, 2048, 512)]:
        state = LoRAPre(rank=r).init(torch.empty(m, n, device="meta"))
        assert sum(t.numel() for t in state.values()) == 2 * (m + n) * r


def test_the_readme_example_works() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    opt = gossamer.Optimizer(gossamer.param_groups(model, gossamer.LoRAPre(rank=4)), lr=1e-3)
    loss = model(torch.randn(3, 16)).square().mean()
    loss.backward()
    opt.step()
    assert "lora-pre" in str(opt.plan())


def test_names_are_unique_and_the_checkpoints() -> None:
    one, two = matrix(4, 3), matrix(4, 3)
    with pytest.raises(UserError) as error:
        Optimizer([{"params": [("w", one)]}, {"params": [("w", two)]}])
    one_line(error, "'w'", "own name")
    saved = Optimizer([("q", one), ("k", two)])
    step(saved, one)
    other = Optimizer([("k", two), ("q", one)])
    with pytest.raises(UserError) as error:
        other.load_state_dict(saved.state_dict())
    one_line(error, "'q'", "'k'")


def test_what_a_method_refuses_it_refuses_before_the_first_step() -> None:
    with pytest.raises(UserError, match="blocks is 5"):
        Optimizer([{"params": [matrix(12, 3)], "method": AdamMini(blocks=5)}])


@pytest.mark.parametrize("name", methods())
def test_an_empty_shard_is_skipped(name: str) -> None:
    full, empties = matrix(4, 3), [matrix(0, 5), matrix(5, 0)]
    opt = Optimizer([{"params": [*empties, full], "method": methods()[name].cls()}])
    for p in (full, *empties):
        p.grad = torch.ones_like(p)
    before = full.detach().clone()
    opt.step()
    assert not torch.equal(full, before) and not any(p in opt.state for p in empties)
