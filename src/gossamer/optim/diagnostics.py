"""Why a method drifts, in numbers: its moments beside exact ones, its updates, its subspace, its lost writes.

    diagnostics = Diagnostics(opt, names=("layers.0.*q_proj",), every=10)
    opt.step()
    diagnostics.records  # at steps 10, 20, ...: [{"name": "layers.0...", "m_error": 0.21, "update_rms": 0.4, ...}]

A record holds what could be measured of one parameter at one step:

    m_error     ||m - m*|| / ||m*||, Frobenius: m is the method's first moment as it stands after the step, m* the exact
                moving average of the gradients with the same decay; both bias-corrected. For an `Inspectable` method
    v_error     the same for the second moment and the squared gradients
    update_rms  root mean square of the direction: of the intended change over the learning rate, decay and rounding
                excluded
    update_max  its largest magnitude
    overlap     ||Q'^T Q||_F^2 / r in [0, 1]: Q' and Q span the method's subspace at the last look and at this one
    lost        share of the entries with an intended change whose stored value stayed as it was

Nothing of the run is changed by looking: no number is drawn, no state written to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gossamer.errors import UserError, matching, nearest
from gossamer.linalg import orthonormalize
from gossamer.optim.contract import MOMENTS, State, entry_of
from gossamer.optim.optimizer import Optimizer

QUANTITIES = ("m_error", "v_error", "update_rms", "update_max", "overlap", "lost")

MISSED = 1e-3
"""How much of a moment's weight may lie on gradients that a shadow begun late has not seen, for it to be compared."""

Record = dict[str, Any]


@runtime_checkable
class Inspectable(Protocol):
    """What a method may offer beside the contract: to say which moments its state stands for."""

    @property
    def betas(self) -> tuple[float, float]:
        """Decay of the first and of the second moment."""
        ...

    def moments(self, param: Tensor, state: State, m_step: int, v_step: int) -> dict[str, Tensor]:
        """The dense, bias-corrected moments after so many steps since each was last zero, in the parameter's shape.

        "m" estimates E g and decays by `betas[0]`, "v" estimates E g^2 and decays by `betas[1]`; a moment that the
        method does not keep is left out. `param` gives the shape. Writes to nothing.
        """
        ...


class Diagnostics:
    """Watch parameters of an optimizer from its first step on, or from any other.

    Costs two tensors (fp32, or wider parameters' dtype) of a watched parameter's shape if its method is `Inspectable`,
    advanced at every step; everything else happens at the steps that are looked at.

    Args:
        names: regular expressions, searched in the names of `optimizer.plan()`.
        every: a parameter is looked at when its own step count is a multiple of this.

    Raises:
        UserError: an expression that is none or that matches no parameter; `every` below 1.
    """

    records: list[Record]
    """Of the last step: a dict for each parameter looked at, `name` and whatever of QUANTITIES there was."""

    def __init__(self, optimizer: Optimizer, names: Iterable[str], every: int = 10) -> None:
        if every < 1:
            raise UserError(f"diagnose: every is {every}; allowed: an integer >= 1")
        methods = {name: group["method"] for name, _, group in optimizer.members()}
        chosen = {name for pattern in names for name in _matching(pattern, methods)}
        self.optimizer, self.every, self.records = optimizer, every, []
        self._kept: dict[str, State] = {name: {} for name in methods if name in chosen}
        self._pending: dict[str, tuple[Record, nn.Parameter, Tensor, Tensor]] = {}
        optimizer.observers = (*optimizer.observers, self._observe)
        self._hook = optimizer.register_step_post_hook(self._finish)

    def detach(self) -> None:
        """Stop watching."""
        self.optimizer.observers = tuple(look for look in self.optimizer.observers if look != self._observe)
        self._hook.remove()

    def watched(self) -> list[dict[str, Any]]:
        """Each watched parameter: `name`, `method`, and whether that is `inspectable`, so has errors of moments."""
        methods = {name: group["method"] for name, _, group in self.optimizer.members()}
        return [
            {"name": n, "method": entry_of(methods[n]).name, "inspectable": isinstance(methods[n], Inspectable)}
            for n in self._kept
        ]

    def state_dict(self) -> dict[str, State]:
        """What is kept of each watched parameter: shadow moments, how many gradients they saw, the last subspace."""
        return {name: dict(kept) for name, kept in self._kept.items()}

    def load_state_dict(self, state_dict: Mapping[str, State]) -> None:
        """Continue exactly. A parameter that `state_dict` lacks begins late; one that is not watched is left out."""
        params = {name: param for name, param, _ in self.optimizer.members()}
        for name in self._kept:
            self._kept[name] = {
                key: value.clone() if key.endswith("_seen") else value.to(params[name].device, copy=True)
                for key, value in state_dict.get(name, {}).items()
            }

    def _observe(self, name: str, param: nn.Parameter, group: dict[str, Any], grad: Tensor, direction: Tensor) -> None:
        if name not in self._kept:
            return
        kept, state, method = self._kept[name], self.optimizer.state[param], group["method"]
        record: Record = {"name": name}
        look = int(state["step"]) % self.every == 0
        if isinstance(method, Inspectable):
            _advance_(kept, state, method, grad)
            record |= _errors(kept, param, state, method) if look else {}
        if not look:
            return
        record |= _overlap(kept, state)
        record["update_rms"] = float(_norm(direction)) / max(direction.numel(), 1) ** 0.5
        record["update_max"] = float(direction.abs().amax()) if direction.numel() else 0.0
        self._pending[name] = record, param, param.detach().clone(), direction * group["lr"] != 0

    @torch.no_grad()
    def _finish(self, *_: Any) -> None:
        """After the step: what was written where something was meant to be."""
        for record, param, before, intended in self._pending.values():
            if count := int(intended.sum()):
                record["lost"] = int((intended & (param == before)).sum()) / count
        self.records = [record for record, *_ in self._pending.values()]
        self._pending = {}


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    found = matching(pattern, names, "diagnose")
    if not found:
        raise UserError(f"diagnose: {pattern!r} matches no parameter's name{nearest(pattern, names)}")
    return found


def _advance_(kept: State, state: State, method: Inspectable, grad: Tensor) -> None:
    """Advance the exact moments as dense Adam does. They are reset when the optimizer's are."""
    for moment in MOMENTS:
        if moment not in kept or int(state[f"{moment}_step"]) == 1:
            kept[moment], kept[f"{moment}_seen"] = torch.zeros_like(grad), torch.zeros((), dtype=torch.int64)
        kept[f"{moment}_seen"] += 1
    kept["m"].lerp_(grad, 1 - method.betas[0])
    kept["v"].mul_(method.betas[1]).addcmul_(grad, grad, value=1 - method.betas[1])


def _errors(kept: State, param: Tensor, state: State, method: Inspectable) -> Record:
    steps = [int(state[f"{moment}_step"]) for moment in MOMENTS]
    ours, record = method.moments(param, state, *steps), {}
    for moment, decay, step in zip(MOMENTS, method.betas, steps, strict=True):
        seen = int(kept[f"{moment}_seen"])
        missed = (decay**seen - decay**step) / (1 - decay**step)  # of weights that sum to one
        if moment in ours and missed <= MISSED:
            exact = kept[moment] / (1 - decay**seen)
            record[f"{moment}_error"] = float(_norm(ours[moment] - exact) / _norm(exact))
    return record


def _overlap(kept: State, state: State) -> Record:
    """Compare the subspace with the last look's, then keep it for the next."""
    if "basis" in state:
        now = state["basis"].clone()
    elif "m_B" in state:
        now = orthonormalize(state["m_B"]).contiguous()  # as it is after a checkpoint, which has no strides
    else:
        return {}
    old, kept["basis"] = kept.get("basis"), now
    if old is None or old.shape != now.shape:  # the first look, or another rank
        return {}
    return {"overlap": float((old.mT @ now).square().sum()) / now.shape[-1]}


def _norm(x: Tensor) -> Tensor:
    """In float64: the squares of a second moment of tiny gradients underflow in fp32."""
    return torch.linalg.vector_norm(x, dtype=torch.float64)
