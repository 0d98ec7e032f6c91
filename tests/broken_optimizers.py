"""Optimizers with one fault each: `tests/test_conformance_kit.py` asks the conformance kit to find it."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Sound(torch.optim.Optimizer):
    """Adam with decoupled decay, which has no fault."""

    def __init__(self, params: Any, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0, maximize=False) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, -p.grad if group["maximize"] else p.grad, group)
        return loss

    def init(self, p: Tensor) -> dict[str, Any]:
        return {"step": torch.zeros(()), "m": torch.zeros_like(p), "v": torch.zeros_like(p)}

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(self.init(p))
        (beta1, beta2), lr = group["betas"], group["lr"]
        state["step"] += 1
        state["m"].lerp_(grad, 1 - beta1)
        state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(lr * state["m"] / (state["v"].sqrt() + 1e-8))


class Projector:
    pass


class StateWithObject(Sound):
    def init(self, p: Tensor) -> dict[str, Any]:
        return {**super().init(p), "projector": Projector()}


class StateWithText(Sound):
    def init(self, p: Tensor) -> dict[str, Any]:
        return {**super().init(p), "kind": {"dense"}}


class StateWithFunction(Sound):
    def init(self, p: Tensor) -> dict[str, Any]:
        return {**super().init(p), "project": lambda x: x}


class StateWithSeed(Sound):
    def init(self, p: Tensor) -> dict[str, Any]:
        return {**super().init(p), "seed": torch.tensor(123456789)}


class MomentsInFp32(Sound):
    def init(self, p: Tensor) -> dict[str, Any]:
        return {"step": torch.zeros(()), "m": torch.zeros_like(p).float(), "v": torch.zeros_like(p).float()}

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        grad = grad.to(self.state[p]["m"].dtype if self.state[p] else torch.float32)
        super().update(p, grad, group)


class CountsOutsideState(Sound):
    calls = 0

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        self.calls += 1
        super().update(p, grad, {**group, "lr": group["lr"] / self.calls})


class OwnWord(Sound):
    def load_state_dict(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().load_state_dict(state)


class AttributeThatIsNotCopied(Sound):
    def __init__(self, params: Any) -> None:
        self.damping = 0.5
        super().__init__(params)

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super().update(p, self.damping * grad, group)


class SkipsVectors(Sound):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if p.ndim == 2:
            super().update(p, grad, group)


class NoneIsZero(Sound):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return super().step(closure)


class Normalized(Sound):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super().update(p, grad / grad.norm(), group)


class DecayBesideLr(Sound):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        p.mul_(0.99)
        super().update(p, grad, group)


class Viewed(Sound):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super().update(p, grad.view(-1).view(p.shape), group)


class ReadsMemory(Sound):
    """As a kernel that is given a pointer and no strides."""

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super().update(p, torch.as_strided(grad, p.shape, p.stride()), group)


class ClosureWithoutGradients(Sound):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        super().step()
        return loss


class LossNotReturned(Sound):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)


class ZeroGradWithoutOptions(Sound):
    def zero_grad(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().zero_grad()


class DrawsGlobally(Sound):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super().update(p, grad + 0 * torch.rand(()), group)


class KeepsParameters(Sound):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.mine = [p for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["params"] = self.mine
        return super().step(closure)


class StateMadeOnce(Sound):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.known = {id(p): True for group in self.param_groups for p in group["params"]}

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if self.known[id(p)]:
            super().update(p, grad, group)


class OwnLr(Sound):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super().update(p, grad, {**group, "lr": self.defaults["lr"]})


class LrAsNumber(Sound):
    def __init__(self, params: Any, lr: Any = 1e-2) -> None:
        super().__init__(params, lr=float(lr))


class DecaysMatrices(Sound):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super().update(p, grad, group if p.ndim == 2 else {**group, "weight_decay": 0.0})


class BetasOfMatrices(Sound):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super().update(p, grad, group if p.ndim == 2 else {**group, "betas": (0.9, 0.99)})


class IgnoresMaximize(Sound):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super().update(p, -grad if group["maximize"] else grad, group)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class NormOfShard(Sound):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super().update(p, grad, {**group, "lr": group["lr"] * float(local(grad).norm())})


class RefusesEmptyShard(Sound):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        local(grad).max()
        super().update(p, grad, group)


class StateOfShard(Sound):
    """Steps as one process does, but its state does not say that it is a part."""

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if not isinstance(p, DTensor):
            super().update(p, grad, group)
            return
        part = p.to_local()
        self.state[part] = self.state[p]
        super().update(part, local(grad), group)
        self.state[p] = self.state.pop(part)


class Hangs(Sound):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if isinstance(p, DTensor) and torch.distributed.get_rank() == 1:
            time.sleep(1000)
        super().update(p, grad, group)


class Dies(Sound):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if isinstance(p, DTensor) and torch.distributed.get_rank() == 1:
            print("out of memory", flush=True)
            os._exit(3)
        super().update(p, grad, group)


class RefusesTensorLr(Sound):
    def __init__(self, params: Any, lr: Any = 1e-2) -> None:
        if isinstance(lr, Tensor):
            raise ValueError("lr is a tensor; allowed: numbers")
        super().__init__(params, lr=lr)


def of_a_model(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) is is2] for is2 in (True, False))
    return Sound([{"params": matrices}, {"params": vectors}], lr=lr)


def forgives(params: Any, **options: Any) -> torch.optim.Optimizer:
    """Passes on what it is given."""
    return LrAsNumber(params, **options)


def no_optimizer(params: Any) -> int:
    return 1


NOT_CALLABLE = 1
