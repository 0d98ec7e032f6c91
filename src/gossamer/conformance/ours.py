"""Our own methods, as the kit builds any optimizer."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from gossamer.optim import Optimizer, param_groups
from gossamer.optim.contract import build, describe
from gossamer.optim.groups import default_fallback


def method(model: nn.Module, name: str, **options: Any) -> Optimizer:
    """`Optimizer` with the registered method `name` for the hidden matrices.

        pytest --pyargs gossamer.conformance --optimizer gossamer.conformance:method \\
            --optimizer-arg name=mlorc --optimizer-arg rank=4

    Args:
        options: of the optimizer (`lr`, ...) or the method (`rank`, ...). Those that the fallback knows too (`betas`,
            `eps`) it is given as well, so that they reach every parameter.
    """
    taken = inspect.signature(Optimizer).parameters
    fields = {key: value for key, value in options.items() if key not in taken}
    fallback = describe(default_fallback())
    shared = {key: value for key, value in fields.items() if key in fallback}
    groups = param_groups(model, build(name, **fields), fallback=build(**{**fallback, **shared}))
    return Optimizer(groups, **{key: value for key, value in options.items() if key in taken})
