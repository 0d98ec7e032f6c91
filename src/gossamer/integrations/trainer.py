"""Hugging Face `Trainer`, and what is built on it (TRL): the optimizer is made late, from the model that is trained.

    Trainer(model, args, ..., optimizer_cls_and_kwargs=for_trainer(args, gossamer.LoRAPre(rank=128)))

Trainer has one door for optimizers it does not know: a pair `(cls, kwargs)`. A `cls` that is no `torch.optim.Optimizer`
is a factory, called `cls()(model, **kwargs)` once the model is what it will be (adapters, `model_init`).
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from gossamer.errors import UserError
from gossamer.optim import Optimizer, param_groups
from gossamer.optim.contract import Method, build
from gossamer.optim.groups import Rules, default_fallback

if TYPE_CHECKING:
    from transformers import TrainingArguments

IGNORED = {
    "optim": "the method decides",
    "optim_args": "hyperparameters are the method's",
    "adam_beta1": "pass betas to the method and to fallback",
    "adam_beta2": "pass betas to the method and to fallback",
    "adam_epsilon": "pass eps to the method and to fallback",
}
"""Training arguments that would change nothing, and what is meant instead."""


def for_trainer(
    args: TrainingArguments,
    method: Method | str,
    *,
    fallback: Method | None = None,
    fallback_lr: float | None = None,
    rules: Rules = (),
    rounding: str = "stochastic",
    **hyperparameters: Any,
) -> tuple[Any, dict[str, Any]]:
    """What to pass as `optimizer_cls_and_kwargs` to `transformers.Trainer` or TRL's trainers.

    Of `args`, the optimizer takes `learning_rate`, `weight_decay` (decoupled; of every group, but as Trainer's own
    optimizers not of norms and biases), `seed`, and `optim_target_modules` as Trainer means it: "all-linear", a regular
    expression that matches a module's whole name, or a list of parts of names. `method` then trains the `nn.Linear`
    weights so named and `fallback` everything else; without it, the hidden matrices of `gossamer.param_groups`.

    Args:
        args: the Trainer's own.
        method: an object, or a registered name with its `hyperparameters`: `for_trainer(args, "galore", rank=128)`.
        fallback, fallback_lr, rules: as `gossamer.param_groups`. Schedules scale `fallback_lr` like `learning_rate`.
        rounding: as `gossamer.Optimizer`.

    Raises:
        UserError: arguments that would be ignored (`optim`, `optim_args`, `adam_*` other than their defaults),
            DeepSpeed, an unknown name or hyperparameter; when the optimizer is made, a target that names no
            linear layer, or a model under FSDP1.
    """
    defaults = {field.name: field.default for field in fields(args)}
    for name, instead in IGNORED.items():
        if (value := getattr(args, name)) != defaults[name]:
            given = getattr(value, "value", value)  # `optim` is an enumeration by now
            raise UserError(f"for_trainer: {name}={given!r} of TrainingArguments would be ignored; {instead}")
    if args.deepspeed_plugin is not None:
        raise UserError("for_trainer: DeepSpeed flattens parameters, so no matrix is left to a method; use FSDP2")
    if isinstance(method, str):
        method = build(method, **hyperparameters)
    elif hyperparameters:
        raise UserError(f"for_trainer: {min(hyperparameters)!r} belongs in the method: {type(method).__name__}(...)")
    kwargs = {"method": method, "fallback": fallback, "fallback_lr": fallback_lr, "rules": rules, "rounding": rounding}
    return TrainerOptimizer, {"args": args, **kwargs}


class TrainerOptimizer:
    """Makes the optimizer when Trainer asks for it."""

    def __call__(
        self,
        model: nn.Module,
        *,
        args: TrainingArguments,
        method: Method,
        fallback: Method | None,
        fallback_lr: float | None,
        rules: Rules,
        rounding: str,
    ) -> Optimizer:
        from transformers import Trainer

        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise UserError("for_trainer: FSDP1 flattens parameters; use FSDP2 (fsdp_config={'fsdp_version': 2})")
        fallback = fallback or default_fallback()
        if (targets := args.optim_target_modules) is None:
            groups = param_groups(model, method, fallback=fallback, fallback_lr=fallback_lr, rules=rules)
        else:
            rules = [*rules, (_names_of(model, targets), method)]
            groups = param_groups(model, fallback, fallback=fallback, fallback_lr=fallback_lr, rules=rules)
            groups.sort(key=lambda group: group["method"] is not method)  # Trainer logs the first group's learning rate
        # a method that reads nothing of its trainer: Trainer's word on which parameters decay
        decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
        groups = [part for group in groups for part in _split(group, decayed, args.weight_decay)]
        return Optimizer(groups, lr=args.learning_rate, rounding=rounding, seed=args.seed)


def _names_of(model: nn.Module, targets: str | list[str]) -> str:
    """A regular expression of the trainable weights that `optim_target_modules` names."""
    from transformers.trainer_utils import check_target_module_exists

    everything = isinstance(targets, str) and targets.replace("_", "-") == "all-linear"
    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
        if everything or check_target_module_exists(targets, name)
    ]
    if not names:
        raise UserError(f"for_trainer: optim_target_modules={targets!r} names no nn.Linear that is trained")
    return f"^({'|'.join(map(re.escape, names))})$"


def _split(group: dict[str, Any], decayed: set[str], weight_decay: float) -> list[dict[str, Any]]:
    """The group's parameters that decay, and those that do not."""
    parts = []
    for decay, names in ((weight_decay, decayed), (0.0, set(group["param_names"]) - decayed)):
        chosen = [i for i, name in enumerate(group["param_names"]) if name in names]
        if chosen:
            columns = {key: [group[key][i] for i in chosen] for key in ("params", "param_names", "why")}
            parts.append({**group, **columns, "weight_decay": decay})
    return parts
