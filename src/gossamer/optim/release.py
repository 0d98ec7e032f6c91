"""Step each parameter within the backward pass and free its gradient there: one layer's gradients are held, not all.

    released = gossamer.release_gradients(model, opt)
    for inputs, targets in data:
        loss(model(inputs), targets).backward()    # a parameter steps as soon as its gradient is whole
        opt.step()                                 # the end of the step: does what had to wait, and tells schedulers
        scheduler.step()

Everything a step is made of (learning rates, decay, rounding, observers, random streams) is the optimizer's own, read
when the parameter steps; weights and state get the bits of a step after the backward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from gossamer.errors import UserError
from gossamer.optim.contract import check_choice
from gossamer.optim.optimizer import Optimizer

CLIP = ("two-pass", "previous")

NORM = "grad_norm"
"""The group entry that holds the last known norm, so that it is saved and restored with the optimizer."""


SLACK = 1e-4
"""By which part a measured norm may differ from that of the gradients that stepped: far above what sums in another
order (atomics on a GPU) change, 1e-6, and below what another dropout mask or batch does, some per cent."""


def release_gradients(
    model: nn.Module, optimizer: Optimizer, *, max_norm: float | None = None, clip: str = "two-pass"
) -> GradientRelease:
    """Have the parameters of `optimizer` step in the backward pass, from now on.

    The loop keeps its `optimizer.step()` after the last backward pass of a step. All backward passes before the last
    belong in `accumulate()`; a parameter that would step twice between two calls of `optimizer.step()` is an error.

    Args:
        model: everything the optimizer trains, sharded already if it is to be (`fully_shard`).
        max_norm: of the gradients of all parameters together, as for `torch.nn.utils.clip_grad_norm_`; inf measures and
            scales nothing, None does not measure. That function itself finds no gradients to clip.
        clip: where the norm comes from. "two-pass": a backward pass under `measure()`, which steps nothing, goes before
            the last one; exact. "previous": the norm of the step before; it scales nothing in the first step.

    Raises:
        UserError: an optimizer of another kind, or released already; `DistributedDataParallel` or flattened sharding,
            which reduce gradients later than they are ready; a trainable parameter that the optimizer does not have;
            `max_norm` that is not positive. In a step: see `GradientRelease`.
    """
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"release_gradients: the optimizer is {type(optimizer).__name__}; allowed: gossamer.Optimizer")
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), GradientRelease) for hook in hooks):
        raise UserError("release_gradients: this optimizer's gradients are released already; call remove() first")
    check_choice("release_gradients", clip=(clip, CLIP))
    if max_norm is not None and not max_norm > 0:
        raise UserError(f"release_gradients: max_norm is {max_norm}; allowed: a number > 0, or None")
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise UserError(
                f"release_gradients: {name or 'the model'} is DistributedDataParallel, which keeps all gradients in "
                "buckets of its own and reduces them late; shard the model by fully_shard instead"
            )
    trained = {param for _, param, _ in optimizer.members()}
    for name, param in model.named_parameters():
        if getattr(param, "_fsdp_flattened", False):
            raise UserError(f"release_gradients: {name!r} is part of a flat parameter; shard the model by fully_shard")
        if param.requires_grad and param not in trained:
            raise UserError(
                f"release_gradients: {name!r} gets a gradient that nothing would free, since the optimizer does not "
                "train it; allowed: requires_grad=False, or a place in the optimizer"
            )
    return GradientRelease(model, optimizer, max_norm, clip)


class GradientRelease:
    """What `release_gradients` returns: which backward passes step, and the norm.

    A parameter without a gradient does not step. One that has a gradient but no hook (it came into the optimizer or was
    unfrozen later), or got none in the last backward pass but some in `accumulate()`, steps in `optimizer.step()`.

    Raises:
        UserError: in `backward()`: a parameter that has stepped gets another gradient (an `accumulate()` is missing, or
            a weight is in several reentrant checkpoints); no norm was measured for "two-pass". In `optimizer.step()`:
            a closure; a `GradScaler`; a gradient of a parameter that has stepped; another norm than measured.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, max_norm: float | None, clip: str) -> None:
        self.model, self.optimizer, self.max_norm, self.clip = model, optimizer, max_norm, clip
        groups = enumerate(optimizer.param_groups)  # not the groups themselves, which loading a checkpoint replaces
        self._places = {param: (g, i) for g, group in groups for i, param in enumerate(group["params"])}
        self._instead: Callable[[nn.Parameter], None] | None = None
        self._stepped: set[Tensor] = set()
        self._norms: dict[Tensor, Tensor] = {}
        self._measured = False
        if max_norm is not None:
            for group in optimizer.param_groups:
                group.setdefault(NORM, torch.zeros(()))  # scales nothing
        self._hooks: list[Any] = [
            param.register_post_accumulate_grad_hook(self._ready) for param in self._places if param.requires_grad
        ]
        self._hooks.append(optimizer.register_step_pre_hook(self._finish))
        self._hooks.append(optimizer.register_step_post_hook(self._end))
        vars(optimizer)["_step_supports_amp_scaling"] = True  # so that a GradScaler comes as far as `_finish`

    @property
    def norm(self) -> Tensor:
        """Of all gradients before clipping, 0-dim: as `measure()` found it, or of those that have stepped in this step,
        or, before any has, of the last step; 0 before the first.

        The last step's is saved and restored with the optimizer, since "previous" scales the next one by it.
        """
        if self.max_norm is None:
            raise UserError("release_gradients: max_norm is None, so there is no norm; math.inf only measures")
        return self._total() if self._stepped and not self._measured else self.optimizer.param_groups[0][NORM]

    def remove(self) -> None:
        """Let gradients stay until `optimizer.step()` again."""
        for hook in self._hooks:
            hook.remove()
        vars(self.optimizer).pop("_step_supports_amp_scaling", None)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes within add up in `.grad`, for the one that steps. All gradients take memory then."""
        with self._doing(lambda param: None):
            yield

    @contextmanager
    def measure(self) -> Iterator[None]:
        """The backward pass within finds this step's norm: each gradient is measured and freed, nothing steps.

        The same gradients must come again in the pass that steps. Keep the graph,

            with released.measure():
                loss.backward(retain_graph=True)
            loss.backward()

        or, to hold no graph meanwhile, compute the loss again with the same random numbers. What was gathered under
        `accumulate()` counts and stays.
        """
        _ = self.norm  # refuses where there is none
        if self._stepped:
            raise UserError("release_gradients: measure() after parameters have stepped; call optimizer.step() first")
        held = {param: param.grad for _, param, _ in self.optimizer.members()}

        @torch.no_grad()
        def take(param: nn.Parameter) -> None:
            grads = [grad for grad in (held[param], param.grad) if grad is not None]
            self._norms[param] = torch.linalg.vector_norm(grads[0] if len(grads) == 1 else grads[0] + grads[1])
            param.grad = None

        try:
            for param in held:
                param.grad = None
            with self._doing(take):
                yield
            for param, grad in held.items():
                if param.grad is not None or (grad is not None and param not in self._norms):
                    take(param)  # it has no hook, or got no gradient in this pass
            self._publish()
        finally:
            self._norms.clear()
            for param, grad in held.items():
                param.grad = grad

    @contextmanager
    def _doing(self, instead: Callable[[nn.Parameter], None]) -> Iterator[None]:
        if self._instead is not None:
            raise UserError("release_gradients: accumulate() and measure() cannot stand within one another")
        self._instead = instead
        try:
            yield
        finally:
            self._instead = None

    @torch.no_grad()
    def _ready(self, param: nn.Parameter) -> None:
        """Called when a gradient is whole: by autograd, or by `fully_shard` when it has reduced it."""
        self._check_first(param)
        if self._instead is not None:
            self._instead(param)
            return
        group, i = self.optimizer.param_groups[self._places[param][0]], self._places[param][1]
        if self.max_norm is not None:
            if self.clip == "two-pass" and not self._measured:
                raise UserError(
                    "release_gradients: clip is 'two-pass' and the norm of this step is not known; before it: "
                    "with released.measure(): loss.backward(retain_graph=True)"
                )
            self._note([param])
            clip_grads_with_norm_([param], self.max_norm, group[NORM])
        self.optimizer.step_members([(group["param_names"][i], group["params"][i], group)])
        param.grad = None
        self._stepped.add(param)

    def _check_first(self, param: Tensor) -> None:
        if param in self._stepped:
            name = next(name for name, other, _ in self.optimizer.members() if other is param)
            raise UserError(
                f"release_gradients: {name!r} has stepped and got another gradient; allowed in a step: one backward "
                "pass outside accumulate(), the last one, then step(); and no weight in two reentrant checkpoints"
            )

    def _note(self, params: list[nn.Parameter]) -> None:
        for param in params:
            assert param.grad is not None
            self._norms[param] = torch.linalg.vector_norm(param.grad)

    def _total(self) -> Tensor:
        """The norm of all parts, in the model's order and as `clip_grad_norm_` takes it, so that the bits are its."""
        by_mesh: defaultdict[Any, list[Tensor]] = defaultdict(list)
        for param in dict.fromkeys((*self.model.parameters(), *(param for _, param, _ in self.optimizer.members()))):
            if (norm := self._norms.get(param)) is not None:
                by_mesh[getattr(norm, "device_mesh", None)].append(norm)
        totals = []
        for norms in by_mesh.values():
            total: Any = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
            totals.append(total.full_tensor() if hasattr(total, "full_tensor") else total)
        return totals[0] if len(totals) == 1 else torch.linalg.vector_norm(torch.stack(totals))

    def _publish(self) -> None:
        if self._norms:
            norm, self._measured = self._total(), True
            for group in self.optimizer.param_groups:
                group[NORM] = norm

    @torch.no_grad()
    def _finish(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before `optimizer.step()`, which steps what has a gradient still."""
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise UserError("release_gradients: the backward pass of a closure would step by itself; allowed: step()")
        if hasattr(optimizer, "grad_scale"):
            raise UserError(
                "release_gradients: a GradScaler unscales gradients after the backward pass, where none are left; "
                "allowed: bf16 or fp32 without one"
            )
        waiting = [param for _, param, _ in optimizer.members() if param.grad is not None]
        for param in waiting:
            self._check_first(param)
        if self.max_norm is not None and waiting:
            self._note(waiting)
            if not self._stepped and not self._measured:  # all gradients are here: nothing has to be guessed
                self._publish()
            clip_grads_with_norm_(waiting, self.max_norm, optimizer.param_groups[0][NORM])

    def _end(self, *_: Any) -> None:
        """After `optimizer.step()`."""
        before = self.norm if self._measured else None
        if self._norms:
            self._publish()
        self._norms.clear()
        self._stepped.clear()
        self._measured = False
        if before is not None and abs(self.norm - before) > before * max(SLACK, 2 * torch.finfo(before.dtype).eps):
            raise UserError(
                f"release_gradients: the norm was {float(before):.6g} under measure() and {float(self.norm):.6g} in "
                "the pass that stepped; both must see the same rows, random numbers and gradient reduction"
            )
