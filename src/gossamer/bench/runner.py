"""Running a suite: one row a finished run, nothing trained twice."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import layers
from gossamer.bench.suite import SUITES, Bench
from gossamer.bench.timing import step_time_ratio
from gossamer.layers import Parametrization
from gossamer.models import build_model, resolve_config
from gossamer.train import Pretrain, jsonl, pretrain


def bench(options: Bench) -> Path:
    """Train what is missing of a suite, append its rows to `<folder>/rows.jsonl`, and return the folder."""
    suite, folder = SUITES[options.suite], options.folder
    recipes = options.recipes()
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    finished = _finished(rows)
    for recipe in recipes:
        ratio: float | None = None
        for lr in options.lrs or (recipe.lr,):
            for seed in options.seeds:
                label = f"{recipe.name} lr {lr:g} seed {seed}"
                steps = options.steps or suite.steps
                every = -(-steps // suite.evals)
                config = Pretrain(
                    method=recipe.method,
                    layers=recipe.layers,
                    restarts=recipe.restarts,
                    model=suite.model,
                    data=suite.data,
                    out=folder / label.replace(" ", "-"),
                    resume=True,
                    steps=steps,
                    batch_size=suite.batch_size,
                    lr=lr,
                    fallback_lr=suite.fallback_lr,
                    eval_every=every,
                    eval_tokens=suite.eval_tokens,
                    save_every=every,
                    keep_last=1,
                    seed=seed,
                )
                if label in finished and _same(finished[label]["config"], config):
                    continue
                if label in finished:  # made under another configuration: its checkpoints cannot be continued
                    shutil.rmtree(config.out, ignore_errors=True)
                make_model = partial(_model, suite.model, recipe.layers)
                ratio = ratio or step_time_ratio(make_model, recipe.method, rounds=options.rounds)
                row = _row(options.suite, label, recipe.name, config, ratio)
                with rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return folder


def _finished(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of each label. A last line torn by a kill is cut off; its run is trained again."""
    if not path.exists():
        return {}
    jsonl.mend(path)
    return {row["label"]: row for _, row in jsonl.read(path)}


def _same(saved: dict[str, Any], config: Pretrain[Any, Any, Any]) -> bool:
    """Whether a run was made under this configuration, whatever its folder is called."""
    return {**saved, "out": None} == {**json.loads(json.dumps(config.to_json())), "out": None}


def _row(suite: str, label: str, name: str, config: Pretrain[Any, Any, Any], ratio: float) -> dict[str, Any]:
    result = pretrain(config, label=label)
    log = config.out / "log.jsonl"
    _, start = next(jsonl.read(log))
    return {
        "suite": suite,
        "label": label,
        "method": name,
        "lr": config.lr,
        "fallback_lr": config.fallback_lr,
        "seed": config.seed,
        "steps": config.steps,
        "perplexity": result.score.perplexity,
        "legacy_perplexity": result.score.legacy_perplexity,
        "eval_tokens": result.score.tokens,
        **{f"{part}_bytes": start["memory"][part] for part in ("state", "hidden_state", "weights")},
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "step_time_ratio": ratio,
        "log": str(log.relative_to(config.out.parent)),
        **{key: start[key] for key in ("config", "versions", "hardware", "commit", "time")},
    }


def _model(name: str, parametrization: Parametrization | None) -> nn.Module:
    model = build_model(resolve_config(name), dtype=torch.float32, device="cpu", seed=0)
    if parametrization is not None:
        layers.apply(model, parametrization)
    return model
