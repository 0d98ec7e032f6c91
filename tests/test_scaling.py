"""Power laws of loss against compute: what is fitted, how sure it is, what is drawn, and what published tables say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.bench import scaling
from gossamer.errors import UserError
from gossamer.layers import LoRA, LowRank, SLTrain
from gossamer.memory import meta_model
from gossamer.models import SHAPES
from papers import scaling as published

COMPUTES = np.array([3e17, 2e18, 2e19, 1e20])


def test_a_law_without_noise_is_found_exactly() -> None:
    law = scaling.fit(COMPUTES, 20 * COMPUTES**-0.043)
    assert law.exponent == pytest.approx(0.043, rel=1e-12)  # float64 through logs of 1e20
    assert law.interval == pytest.approx((0.043, 0.043), rel=1e-9)
    assert law.loss([1e21]) == pytest.approx([20 * 1e21**-0.043], rel=1e-12)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """400 tables of four sizes: of the exponent, the law beyond the data, and one more run there."""
    draw, trials, beyond = np.random.default_rng(0), 400, 1e21
    hits = np.zeros(3)
    for _ in range(trials):
        losses = 20 * COMPUTES**-0.043 * np.exp(0.01 * draw.standard_normal(4))
        law = scaling.fit(COMPUTES, losses)
        truth = 20 * beyond**-0.043
        run = truth * np.exp(0.01 * draw.standard_normal())
        pairs = [(law.interval, 0.043), (law.band([beyond]), truth), (law.band([beyond], of_a_run=True), run)]
        hits += [bool(low <= value <= high) for (low, high), value in pairs]
    # 95 % of 400, give or take three standard deviations of a binomial: 3 sqrt(0.95 0.05 / 400) = 0.033
    assert (np.abs(hits / trials - 0.95) < 0.033).all(), hits / trials


@pytest.mark.parametrize(
    ("computes", "losses", "said"),
    [
        ([1e18, 2e18], [3.0, 2.9], "2 computes and 2 losses; allowed: as many of each, at least 3"),
        ([1e18, 2e18, 3e18], [3.0, 2.9], "3 computes and 2 losses"),
        ([1e18, 2e18, 3e18], [3.0, 2.9, math.nan], "not finite and positive; leave out what diverged"),
        ([1e18, 0, 3e18], [3.0, 2.9, 2.8], "not finite and positive"),
        ([1e18, 1e18, 1e18], [3.0, 2.9, 2.8], "every run has the same compute"),
    ],
)
def test_what_cannot_be_fitted(computes: list[float], losses: list[float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        scaling.fit(computes, losses)


@pytest.mark.parametrize("layers", [None, LowRank(rank=8), LoRA(rank=8), SLTrain(rank=8)])
def test_n_counts_what_a_token_is_multiplied_by(layers: Any) -> None:
    shape = SHAPES["tiny"]
    matrices = [(shape.hidden, shape.hidden)] * 4 + [(shape.hidden, shape.intermediate)] * 3
    dense, thin = sum(m * n for m, n in matrices), sum(8 * (m + n) for m, n in matrices)
    hidden = {LowRank: thin, LoRA: dense + thin}.get(type(layers), dense)  # SLTrain forms the dense matrix
    expected = shape.layers * hidden + shape.hidden * shape.vocab
    assert scaling.matrix_parameters(meta_model("tiny", layers, torch.float32)) == expected


def test_n_is_of_the_layers_that_were_replaced() -> None:
    shape = SHAPES["tiny"]
    rows = [row("low-rank", "tiny", 1e-3, 9.0), row("low-rank", "tiny", 1e-3, 9.0)]
    for it, targets in zip(rows, ((), ("mlp",)), strict=True):
        it["config"] |= {"layers": {"name": "low-rank", "rank": 8}, "layer_targets": targets}
    whole, part = sorted(it.matrix_parameters for it in next(iter(scaling.points(rows).values())))
    assert part - whole == shape.layers * 4 * (shape.hidden**2 - 8 * 2 * shape.hidden)  # attention's stay dense


def row(method: str, model: str, lr: float, perplexity: float | None, seed: int = 0, **data: Any) -> dict[str, Any]:
    text = {"data": "python-stdlib", "vocab_size": 2048, "seq_len": 128, **data}
    config = {"model": model, "layers": None, "data": text, "steps": 10, "batch_size": 8, "lr": lr, "seed": seed}
    return {"method": method, "perplexity": perplexity, "config": config}


def laid_out(exponent: float, models: tuple[str, ...] = ("tiny", "9m", "20m")) -> list[dict[str, Any]]:
    """Runs on a law at 2e-3, at 1e-3 worse, at 4e-3 diverged; the larger the model, the rate shifts by one."""
    rows = []
    for place, model in enumerate(models):
        n = scaling.matrix_parameters(meta_model(model, None, torch.float32))
        loss = 60 * scaling.compute(n, 10 * 8 * 128) ** -exponent
        best = 2e-3 / 2**place
        rows += [row("adamw", model, best, math.exp(loss + wobble), seed) for seed, wobble in ((0, 0.01), (1, -0.01))]
        rows += [row("adamw", model, best / 2, math.exp(loss + 0.1)), row("adamw", model, 2 * best, None)]
    return rows


def test_a_figure_is_of_the_best_runs_means_and_their_law() -> None:
    rows = laid_out(0.08)
    figure = scaling.figure(rows)
    assert figure is not None
    band, line, points = figure["data"]
    assert points["name"].startswith("adamw, exponent 0.080 (0.080 to 0.080)")
    assert points["x"] == tuple(sorted(points["x"])) and len(points["x"]) == 3
    assert line["y"] == pytest.approx([points["y"][0], points["y"][-1]])  # seeds average to the law
    assert len(band["x"]) == len(band["y"]) == 80
    json.dumps(figure, allow_nan=False)
    found = next(iter(scaling.points(rows).values()))
    assert [(it.lr, it.tried) for it in sorted(found, key=lambda it: it.matrix_parameters)] == [
        (rate, (rate / 2, rate, 2 * rate)) for rate in (2e-3, 1e-3, 5e-4)
    ]


def test_losses_on_other_data_are_not_compared() -> None:
    other = [row("adamw", model, 1e-3, 50.0, vocab_size=4096) for model in ("tiny", "9m")]
    assert scaling.figure([row("adamw", "tiny", 1e-3, 50.0), other[1]]) is None
    figure = scaling.figure(laid_out(0.08) + other)
    assert figure is not None
    names = [trace["name"] for trace in figure["data"] if "name" in trace]
    assert [name.partition(", exponent")[0] for name in names] == ["adamw, vocab_size 2048", "adamw, vocab_size 4096"]
    assert "exponent" not in names[1]  # two points


def test_transfer_marks_a_best_rate_at_the_edge() -> None:
    rows = laid_out(0.08)
    figure = scaling.transfer(rows)
    assert figure is not None
    (trace,) = figure["data"]
    assert trace["y"] == [2e-3, 1e-3, 5e-4]
    assert trace["marker"]["symbol"] == ["circle"] * 3  # twice the rate diverged: it is no edge
    assert trace["error_y"]["array"] == pytest.approx([2e-3, 1e-3, 5e-4])
    assert trace["error_y"]["arrayminus"] == pytest.approx([1e-3, 5e-4, 2.5e-4])
    figure = scaling.transfer([row for row in rows if row["perplexity"] is not None])
    assert figure is not None
    (trace,) = figure["data"]
    assert trace["marker"]["symbol"] == ["circle-open"] * 3 and trace["error_y"]["array"] == [0, 0, 0]


@pytest.mark.parametrize("rows", [[], [row("adamw", "tiny", 1e-3, 50.0)], [{"label": "x", "method": "y"}],
                                  [row("adamw", "gone/config.json", lr, 50.0) for lr in (1e-3, 2e-3)]])  # fmt: skip
def test_nothing_to_draw(rows: list[dict[str, Any]]) -> None:
    assert scaling.figure(rows) is None and scaling.transfer(rows) is None


def test_the_parts_of_the_variance_are_all_of_it() -> None:
    computes = tuple(COMPUTES)
    law = 20 * COMPUTES**-0.043
    flat = [published.Curve(name, ("",) * 4, computes, tuple(np.exp(law * f))) for name, f in (("a", 1), ("b", 1.1))]
    parts = published.shares(flat)
    assert sum(parts.values()) == pytest.approx(1, abs=1e-12)
    # constant factors of the loss are methods' alone: the law and a method's offset explain everything
    assert parts["size"] == pytest.approx(0, abs=1e-12) and parts["rest"] == pytest.approx(0, abs=1e-12)
    assert parts["method"] == pytest.approx(math.log(1.1) ** 2 / 4 * 8 / sum_of_squares(flat))


def sum_of_squares(curves: list[published.Curve]) -> float:
    y = np.log([curve.losses for curve in curves])
    return float(((y - y.mean()) ** 2).sum())


def test_what_a_gain_is_worth_in_compute() -> None:
    law = scaling.fit(COMPUTES, 20 * COMPUTES**-0.05)
    better, worse = (math.exp(float(law.loss(c))) for c in (3e19, 1e19))
    assert published.worth(better, worse, law) == pytest.approx(3)


def test_the_committed_table_is_what_the_command_prints() -> None:
    committed = Path(__file__).parent.parent / "results" / "scaling" / "published.md"
    assert committed.read_text() == "\n".join(published.report()) + "\n"
