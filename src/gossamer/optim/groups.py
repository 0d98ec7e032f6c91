"""Which parameter is trained by which method, and why: every trainable parameter exactly once, or an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from gossamer.errors import UserError, matching
from gossamer.optim.contract import Method, entry_of, hashable
from gossamer.optim.methods.adamw import AdamW

Rules = Sequence[tuple[str, Method]]

HIDDEN_MATRIX, SPARSE_VALUES, DENSE = "hidden matrix", "sparse values", "rank >= min(m, n): dense"
HIDDEN = (HIDDEN_MATRIX, SPARSE_VALUES, DENSE)
"""Why a parameter of a hidden layer is trained as it is, unless a rule says otherwise."""

_HEAD_NAMES = re.compile(r"(lm_head|embed_out|output|output_projection|head|score|classifier|\w+_head)$")


def default_fallback() -> Method:
    """What trains the parameters that nobody chose a method for."""
    return AdamW()


def param_groups(
    model: nn.Module | Iterable[Tensor | tuple[str, Tensor]],
    method: Method,
    *,
    fallback: Method | None = None,
    fallback_lr: float | Tensor | None = None,
    rules: Rules = (),
) -> list[dict[str, Any]]:
    """Parameter groups for `gossamer.Optimizer`: hidden matrices under `method`, everything else under `fallback`.

    A hidden matrix is the weight of an `nn.Linear` or of Hugging Face's `Conv1D` that is neither the output head
    (`get_output_embeddings()`, a weight tied to an embedding, or, where the model does not say, a last name such as
    `lm_head` or `classifier`) nor an embedding. Given bare parameters instead of a model, every matrix counts as
    hidden: pass the model if you have it. The factors of a low-rank layer (`gossamer.layers`) are hidden matrices too;
    the values of its sparse part go to `method` if that trains vectors, else to `fallback`.

    Args:
        model: a module, or parameters, or (name, parameter) pairs. Parameters with `requires_grad=False` are left out.
        method: for the hidden matrices. One whose smaller side is no larger than `method.rank` goes to `fallback`.
        fallback: for the rest; `AdamW()` if None.
        fallback_lr: learning rate of what is not hidden (embeddings, output head, norms) and `fallback` trains; the
            optimizer's own if None. Embeddings want a larger one than hidden matrices do, and methods differ in what
            they want for those.
        rules: `(regex, method)` pairs, searched in parameter names; the first match decides the method, and
            only a rank that reaches the smaller side still sends a matrix to `fallback`.

    Returns:
        One dict a method, that of the hidden matrices first: `params`, `param_names`, `why` (one reason a parameter)
        and `method`; the fallback's has its `lr` if `fallback_lr` is given.

    Raises:
        UserError: a rule that matches no parameter or that asks a matrix method to train something else, a model
            without trainable parameters, or a parameter given twice.
    """
    method, fallback = hashable(method), hashable(fallback or default_fallback())
    rules = [(pattern, hashable(ruled)) for pattern, ruled in rules]
    groups: dict[tuple[Method, bool], dict[str, Any]] = {}
    unmatched = {pattern for pattern, _ in rules}
    seen: dict[int, str] = {}
    for name, param, kind in _kinds(model):
        if id(param) in seen:
            raise UserError(f"param_groups: {name!r} is the same parameter as {seen[id(param)]!r}; give it once")
        seen[id(param)] = name
        if not param.requires_grad:
            continue
        if is_flattened(param) and entry_of(method).matrix_only:  # else all of the model would go to the fallback
            raise UserError(
                f"param_groups: {name!r} of shape {tuple(param.shape)} was flattened by FSDP1 or DeepSpeed ZeRO, and "
                f"{entry_of(method).name} trains matrices; shard with {SHARD_WITH}"
            )
        chosen, why = _choose(name, param, kind, method, fallback, rules, unmatched)
        own_lr = fallback_lr is not None and chosen is fallback and kind not in HIDDEN
        group = groups.setdefault(
            (chosen, own_lr),
            {"params": [], "param_names": [], "why": [], "method": chosen, **({"lr": fallback_lr} if own_lr else {})},
        )
        group["params"].append(param)
        group["param_names"].append(name)
        group["why"].append(why)
    if unmatched:
        raise UserError(f"param_groups: rule {min(unmatched)!r} matches no trainable parameter left to it")
    if not groups:
        raise UserError("param_groups: there is no trainable parameter")
    return sorted(groups.values(), key=lambda group: group["method"] is not method)


SHARD_WITH = "FSDP2 (fully_shard) or DDP"
"""What leaves parameters the shapes that matrix methods need."""


def is_flattened(param: Tensor) -> bool:
    """Whether FSDP1 or DeepSpeed ZeRO made it one-dimensional, alone or together with others."""
    marks = ("_is_flat_param", "_fsdp_flattened", "ds_")  # DeepSpeed sets ds_id, ds_shape, ...
    return param.ndim == 1 and any(name.startswith(marks) for name in vars(param))


def refusal(method: Method, shape: Sequence[int]) -> str | None:
    """Why `method` cannot train a parameter of this shape, or None if it can."""
    if entry_of(method).matrix_only and len(shape) != 2:
        return f"{len(shape)}-D"
    return None


def _choose(
    name: str, param: Tensor, kind: str, method: Method, fallback: Method, rules: Rules, unmatched: set[str]
) -> tuple[Method, str]:
    why = kind
    for pattern, ruled in rules:
        if matching(pattern, [name], "param_groups: rule"):
            if (reason := refusal(ruled, param.shape)) is not None:
                raise UserError(
                    f"param_groups: rule {pattern!r} gives {name!r} of shape {tuple(param.shape)} to "
                    f"{entry_of(ruled).name}, which trains matrices only; it is {reason}"
                )
            unmatched.discard(pattern)
            method, why = ruled, f"rule {pattern!r}"
            break
    else:
        if kind not in HIDDEN or refusal(method, param.shape) is not None:
            return fallback, kind
    rank = getattr(method, "rank", None)
    if rank is not None and len(param.shape) == 2 and rank >= min(param.shape):
        return fallback, DENSE
    return method, why


def _kinds(model: nn.Module | Iterable[Tensor | tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor, str]]:
    """(name, parameter, kind) of every parameter, where only the kind "hidden matrix" goes to the method."""
    if not isinstance(model, nn.Module):
        for index, item in enumerate(model):
            name, param = item if isinstance(item, tuple) else (f"param.{index}", item)
            yield name, param, HIDDEN_MATRIX if param.ndim == 2 else f"{param.ndim}-D"
        return

    get_head = getattr(model, "get_output_embeddings", None)
    head: Any = get_head() if callable(get_head) else None
    kinds: dict[int, str] = {}
    for path, module in model.named_modules():
        for attribute, kind in getattr(module, "hidden_parameters", {}).items():
            kinds[id(getattr(module, attribute))] = kind
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            kinds[id(module.weight)] = "embedding"
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            is_head = head is None and _HEAD_NAMES.match(path.rpartition(".")[2])
            kinds.setdefault(id(module.weight), "output head" if is_head else HIDDEN_MATRIX)
    if head is not None and kinds.get(id(head.weight)) != "embedding":
        kinds[id(head.weight)] = "output head"
    for name, param in model.named_parameters():
        other = f"{param.ndim}-D" if param.ndim != 2 else "not the weight of a linear layer"
        kind = kinds.get(id(param), other)
        yield name, param, kind if param.ndim == 2 or kind in ("embedding", SPARSE_VALUES) else other


def hidden_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every `nn.Linear` whose weight is a hidden matrix, with its name; no subclass that computes in its own way."""
    hidden = {id(param) for _, param, kind in _kinds(model) if kind == HIDDEN_MATRIX}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and id(module.weight) in hidden:
            yield name, module
