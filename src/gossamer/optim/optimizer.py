"""The one `torch.optim.Optimizer`: it drives every method and knows none by name."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gossamer import linalg
from gossamer.errors import UserError, nearest
from gossamer.kernels import available
from gossamer.optim import contract, sharding
from gossamer.optim.batch import Batch
from gossamer.optim.contract import MOMENTS, Context, Method, State, hash63, moment_of
from gossamer.optim.groups import SHARD_WITH, default_fallback, is_flattened, refusal
from gossamer.optim.sharding import blank, local
from gossamer.optim.stores import arithmetic_dtype
from gossamer.optim.sweep import Scratch, Sweep, Write
from gossamer.rows import HERE, Parts

Observer = Callable[[str, nn.Parameter, dict[str, Any], Tensor, Tensor], None]
"""A function of a parameter's name, itself, its group, the gradient (fp32 or wider, negated under `maximize`) and the
direction: called when its state has been advanced and itself not yet been written."""

COUNTERS = ("step", *(f"{moment}_step" for moment in MOMENTS))
"""How often the parameter was stepped, and how often since each moment was last zero."""


IMPLEMENTATIONS = ("auto", "reference", "fused")

LAUNCHED_TOGETHER = 16
"""Matrices that kernels step in one launch, at most: they keep copies of that many matrices' factors."""


def init_state(method: Method, param: Tensor, layout: Any = None) -> State:
    """Everything the optimizer keeps for one parameter: three counters (fp32, on the CPU) and the method's tensors.

    Runs on the meta device too, so that memory is counted with the same code that takes it. A parameter with a
    `layout` has the method's tensors on its mesh.
    """
    device = "meta" if param.is_meta else "cpu"
    counters = {name: torch.zeros((), dtype=torch.float32, device=device) for name in COUNTERS}
    return {**counters, **(method.init(param) if layout is None else sharding.fresh(method, param, layout))}


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class PlanRow:
    """How one parameter is trained."""

    name: str
    shape: tuple[int, ...]
    method: str
    rank: int | None
    implementation: str
    """"tiles", "kernels" or "reference"; of a DTensor "sharded", "owner" or "whole" (`optim/sharding.py`)."""
    state_bytes: int
    """The method's tensors, over all processes that share them; the driver's counters take 12 bytes more."""
    why: str


class Plan(list[PlanRow]):
    """One row a parameter; prints as a table."""

    @property
    def state_bytes(self) -> int:
        return sum(row.state_bytes for row in self)

    def __str__(self) -> str:
        header = ("parameter", "shape", "method", "rank", "step", "state bytes", "why")
        cells = [
            (
                r.name,
                "x".join(map(str, r.shape)),
                r.method,
                str(r.rank or "-"),
                r.implementation,
                f"{r.state_bytes:,}",
                r.why,
            )
            for r in self
        ]
        cells.append(("total", "", "", "", "", f"{self.state_bytes:,}", ""))
        width = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        right = {3, 5}
        return "\n".join(
            "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, width, strict=True)))
            for row in (header, *cells)
        )


class Reset(NamedTuple):
    """What `Optimizer.reset` touched."""

    parameters: int
    tensors: int
    norm: float
    """Of all those tensors together, before."""
    norm_after: float
    """The same, after: measured, and zero."""


class Optimizer(torch.optim.Optimizer):
    """Train each parameter group by its own method.

        opt = gossamer.Optimizer(gossamer.param_groups(model, LoRAPre(rank=128)), lr=1e-3)

    Parameters that FSDP2 shards are stepped by their rows, with the numbers of one process (docs/distributed.md).

    Args:
        params: groups from `param_groups`, or whatever torch's optimizers take: parameters, (name, parameter) pairs,
            or dicts. A group without a `method` is trained by `AdamW()`.
        lr: learning rate, a float or a tensor.
        weight_decay: decoupled, `W <- (1 - lr weight_decay) W` before the step, as `torch.optim.AdamW`.
        maximize: ascend instead of descend.
        implementation: "auto", which takes a method's fused twin where it has one for the device: on a CPU one that
            goes through a matrix in tiles of rows, on CUDA Triton kernels. A twin makes no temporary of the weight's
            size, except where a projector is refreshed. "reference": every method as it reads. "fused": as "auto", but
            where kernels were written and do not take a parameter, that is an error. They differ by rounding; `plan()`
            says which runs.
        rounding: how a bf16 parameter is written: "stochastic", or "nearest", which loses every update smaller than
            about 1/256 of the weight. Other dtypes are always rounded to nearest.
        seed: of every random number a method or the rounding draws. The stream of a parameter depends on (seed, its
            name, its step) alone, never on the global generator.

    Raises:
        UserError: values out of range, sparse or complex parameters or gradients, a parameter its method cannot train.
    """

    observers: tuple[Observer, ...] = ()
    """Called at each parameter's step; they look and change nothing, except that for kernels, which show no direction,
    the reference steps. Neither saved nor pickled."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        rounding: str = "stochastic",
        seed: int = 0,
        implementation: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "rounding": rounding,
            "seed": seed,
            "implementation": implementation,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group at any time; it is checked, named and completed with the defaults."""
        group, index = dict(param_group), len(self.param_groups)
        group.setdefault("method", default_fallback())
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        if "param_names" not in group:  # torch reads (name, parameter) pairs
            params = [p if isinstance(p, tuple) else (f"group.{index}.{i}", p) for i, p in enumerate(params)]
        super().add_param_group({**group, "params": params})
        try:
            self._check(self.param_groups[-1])
        except UserError:
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        if float(group["lr"]) < 0 or group["weight_decay"] < 0:
            raise UserError(
                f"Optimizer: lr is {float(group['lr'])}, weight_decay is {group['weight_decay']}; allowed: numbers >= 0"
            )
        contract.check_choice(
            "Optimizer",
            rounding=(group["rounding"], ("stochastic", "nearest")),
            implementation=(group["implementation"], IMPLEMENTATIONS),
        )
        group.setdefault("why", ["given"] * len(group["params"]))
        taken = {name for other in self.param_groups[:-1] for name in other["param_names"]}
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if name in taken:  # a random stream belongs to a name, and so does a reset
                raise UserError(f"Optimizer: two parameters are called {name!r}; give each its own name")
            taken.add(name)
            if not param.is_floating_point() or param.is_sparse:
                raise UserError(f"Optimizer: {name!r} is {param.dtype}, {param.layout}; allowed: dense real numbers")
            _check_shape(name, param, group["method"])
            group["method"].init(blank(param))  # what it refuses, it refuses now
            has_kernels = param.is_cuda and hasattr(group["method"], "launch_")
            if group["implementation"] == "fused" and has_kernels and implementation_of(param, group) != "kernels":
                raise UserError(
                    f"Optimizer: {name!r}, {param.dtype} of shape {tuple(param.shape)}, is not taken by the kernels of "
                    f"{contract.entry_of(group['method']).name} (docs/kernels.md); allowed: implementation='auto'"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient. `closure` re-evaluates the loss, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_members(self.members())
        return loss

    @torch.no_grad()
    @linalg.without_autocast()
    def step_members(self, members: Iterable[tuple[str, nn.Parameter, dict[str, Any]]]) -> None:
        """One step for those of these parameters that have a gradient; no step hook is called."""
        alike: defaultdict[tuple[Any, ...], list[Sweep]] = defaultdict(list)
        owned: list[tuple[Method, Sweep]] = []
        for name, param, group in members:
            if param.grad is None or param.numel() == 0:
                continue
            if (sweep := self._begin(name, param, group)) is None:
                continue
            how = implementation_of(param, group)
            if how == "whole":
                _step_whole(group, sweep)
            elif how == "owner" and sweep.context.rows is not HERE:
                owned.append((group["method"], sweep))
            elif how in ("reference", "sharded", "owner") or (how == "kernels" and self.observers):
                self._step_by_reference(name, group, sweep)
            elif self.observers:
                self._step_observed(name, group, sweep)
            else:
                key = id(group), how, param.shape, param.dtype, param.grad.dtype, param.device
                alike[key].append(sweep)
        groups = {id(group): group for group in self.param_groups}
        for (group, how, *_), sweeps in alike.items():
            if how == "tiles":
                groups[group]["method"].step_(sweeps)
            else:
                _launch(groups[group], sweeps)
        if owned:
            _step_by_owners(owned)

    @cached_property
    def _scratch(self) -> Scratch:
        """One set of buffers for all matrices; neither saved nor copied."""
        return Scratch()

    def members(self) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
        """Every parameter with its name and its group."""
        for group in self.param_groups:
            names, params = group["param_names"], group["params"]
            if len(names) != len(params):
                raise UserError(
                    f"Optimizer: {len(names)} parameters from {names[0]!r} on were replaced by {len(params)}, as by "
                    f"DeepSpeed ZeRO, which flattens them; allowed: as many in the same order, as with {SHARD_WITH}"
                )
            for name, param in zip(names, params, strict=True):
                yield name, param, group

    def _begin(self, name: str, param: nn.Parameter, group: dict[str, Any]) -> Sweep | None:
        """The work on one parameter. Its state is made where there is none, and counted on.

        None for a first step with a gradient of zero that is not counted, so that what a first step draws is drawn by
        the first real one: one with a learning rate of zero, by which distributed checkpointing asks for state, or of a
        method that takes a basis from the gradient. The factor beside one that begins at zero has such a gradient.
        """
        grad, method = param.grad, group["method"]
        assert grad is not None
        if grad.is_sparse or grad.is_complex():
            kind = "sparse" if grad.is_sparse else "complex"
            raise UserError(f"Optimizer: the gradient of {name!r} is {kind}; allowed: dense real gradients")
        key = hash63(group["seed"], name)
        layout = sharding.layout_of(name, param, key)
        if layout is not None and self.observers:
            raise UserError(f"Optimizer: {name!r} is a DTensor, which observers cannot look at; detach them")
        rows: Any = HERE if layout is None else layout.rows
        weight, grad = local(param), local(grad)
        state = self.state[param]
        if not state:
            _check_shape(name, param, method)  # it may have been replaced after the check
            state.update(init_state(method, param, layout))
        if not int(state["step"]) and ("basis" in state or not float(group["lr"])) and not bool(rows.any(grad != 0)):
            return None
        for counter in COUNTERS:
            state[counter] += 1
        step, m_step, v_step = (int(state[counter]) for counter in COUNTERS)
        generator = torch.Generator(weight.device).manual_seed(hash63(group["seed"], name, step))
        context = Context(step, m_step, v_step, group["lr"], weight, generator, key, rows)
        stream = generator
        if rows is not HERE:  # rows of other processes are rounded by other numbers
            stream = torch.Generator(weight.device).manual_seed(hash63(group["seed"], name, step, rows.offset))
        write = Write(weight, group["lr"], group["weight_decay"], group["rounding"], stream)
        held = state if layout is None else {k: local(tensor) for k, tensor in state.items()}
        return Sweep(grad, held, context, arithmetic_dtype(param), group["maximize"], write, self._scratch)

    def fresh_state(self, name: str, param: nn.Parameter, group: dict[str, Any]) -> State:
        """What is kept for a parameter before its first step; of a DTensor on its mesh."""
        return init_state(group["method"], param, sharding.layout_of(name, param, hash63(group["seed"], name)))

    def _step_by_reference(self, name: str, group: dict[str, Any], sweep: Sweep) -> None:
        grad = sweep.whole()
        direction = group["method"].update(grad, sweep.state, sweep.context)
        for observe in self.observers:
            observe(name, sweep.context.param, group, grad, direction)  # pyright: ignore
        sweep.descend(slice(None), direction)

    def _step_observed(self, name: str, group: dict[str, Any], sweep: Sweep) -> None:
        """A twin's step, written to a copy first: who looks, looks before the write."""
        param, grad = sweep.context.param, sweep.whole()
        copy, seen = param.clone(), torch.empty_like(grad)
        group["method"].step_([replace(sweep, write=replace(sweep.write, weight=copy), seen=seen)])
        for observe in self.observers:
            observe(name, param, group, grad, seen)  # pyright: ignore
        param.copy_(copy)

    @torch.no_grad()
    def reset(self, names: Iterable[str] | None = None, moments: Iterable[str] = MOMENTS) -> Reset:
        """Forget moments: as if their parameters had never been stepped, bias correction and all.

        Everything else stays: step counts and so the random streams and refresh schedules, projectors, other moments.
        Forgetting "v" alone makes one long step of an Adam-like method, about ten times the usual: the kept momentum
        over the magnitude of a single gradient.

        Args:
            names: of parameters; all if None. A parameter that was never stepped has nothing to forget.
            moments: "m", "v" or both.

        Raises:
            UserError: an unknown moment, or a name that is not a parameter of this optimizer.
        """
        moments = tuple(moments)
        for moment in moments:
            contract.check_choice("reset", moments=(moment, MOMENTS))
        params = {name: param for name, param, _ in self.members()}
        names = list(params) if names is None else list(names)
        for name in names:
            if name not in params:
                raise UserError(f"reset: no parameter {name!r}{nearest(name, params)}; named as in opt.plan()")
        touched = [
            (name, key, tensor)
            for name in names
            for key, tensor in self.state.get(params[name], {}).items()
            if key not in COUNTERS and moment_of(key) in moments
        ]
        before = _norm(tensor for _, _, tensor in touched)
        for name in names:
            for moment in moments:
                if params[name] in self.state:
                    self.state[params[name]][f"{moment}_step"].zero_()
        for _, _, tensor in touched:
            local(tensor).zero_()
        after = _norm(tensor for _, _, tensor in touched)
        return Reset(len({name for name, _, _ in touched}), len(touched), before, after)

    def plan(self) -> Plan:
        """Which method trains each parameter, at which rank, with how much state, and why. Allocates nothing."""
        rows = Plan()
        for group in self.param_groups:
            method = group["method"]
            for name, param, why in zip(group["param_names"], group["params"], group["why"], strict=True):
                meta = blank(param)
                rows.append(
                    PlanRow(
                        name,
                        tuple(param.shape),
                        contract.entry_of(method).name,
                        getattr(method, "rank", None),
                        implementation_of(param, group),
                        num_bytes(method.init(meta).values()),
                        why,
                    )
                )
        return rows

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with each group's method as plain data, so that `torch.load(weights_only=True)` reads it."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group["method"] = contract.describe(group["method"])
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict`: every tensor in its own dtype, every hyperparameter as it was saved.

        torch's own casts state to the parameter's dtype, which ruins fp32 moments over bf16 weights; ours moves tensors
        to the parameter's device and changes nothing else. A hyperparameter the checkpoint lacks takes its default.

        Raises:
            UserError: the checkpoint is of another method or rank, or has other parameters.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict

        saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
        sizes, own_sizes = ([len(g["params"]) for g in groups] for groups in (saved_groups, self.param_groups))
        if sizes != own_sizes:
            raise UserError(
                f"load_state_dict: the checkpoint has groups of {sizes} parameters, the optimizer {own_sizes}"
            )
        state: defaultdict[Tensor, State] = defaultdict(dict)
        groups = []
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            if missing := {"method", "param_names"} - saved.keys():
                raise UserError(
                    f"load_state_dict: a group has no {min(missing)!r}; allowed: what a gossamer.Optimizer saved"
                )
            name, own = saved["method"]["name"], contract.entry_of(group["method"]).name
            if name != own:
                raise UserError(f"load_state_dict: the checkpoint was made by {name!r}, this optimizer runs {own!r}")
            for ours, theirs in zip(group["param_names"], saved["param_names"], strict=True):
                if ours != theirs:  # each has its own random stream
                    raise UserError(f"load_state_dict: the checkpoint has {theirs!r} where this optimizer has {ours!r}")
            for index, param, label in zip(saved["params"], group["params"], group["param_names"], strict=True):
                if index in saved_state:  # else it never had a gradient
                    _check_shapes(label, saved_state[index], init_state(group["method"], blank(param)))
                    put = sharding.putter(label, group["method"], param)
                    state[param] = {
                        key: value.to("cpu", copy=True) if key in COUNTERS else put(key, value)
                        for key, value in saved_state[index].items()
                    }
            method = contract.build(**saved["method"])
            own = {"params": group["params"], "method": method, "implementation": group["implementation"]}
            groups.append({**group, **copy.deepcopy(saved), **own})
        self.__setstate__({"state": state, "param_groups": groups})

        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)


def implementation_of(param: Tensor, group: dict[str, Any]) -> str:
    """How a parameter is stepped: by the method's "reference", by a twin, in "tiles" or by "kernels", or if it is a
    DTensor as `optim/sharding.py` says."""
    method = group["method"]
    if sharding.is_placed(param):
        return sharding.how(method, tuple(param.shape))
    if group["implementation"] != "reference":
        if hasattr(method, "launch_") and available(param.device) and method.can_launch(param):
            return "kernels"
        can_sweep = hasattr(method, "step_") and getattr(method, "can_sweep", lambda: True)()
        if can_sweep and param.ndim == 2 and param.device.type in ("cpu", "meta"):
            return "tiles"
    return "reference"


def _launch(group: dict[str, Any], sweeps: list[Sweep]) -> None:
    for start in range(0, len(sweeps), LAUNCHED_TOGETHER):
        some = sweeps[start : start + LAUNCHED_TOGETHER]
        group["method"].launch_(
            Batch(
                params=[sweep.context.param for sweep in some],
                grads=[sweep.grad for sweep in some],
                states=[sweep.state for sweep in some],
                contexts=[sweep.context for sweep in some],
                **{key: group[key] for key in ("lr", "weight_decay", "maximize", "rounding")},
            )
        )


def _step_whole(group: dict[str, Any], sweep: Sweep) -> None:
    """Every process does the work on all rows, and keeps its own."""
    ctx, rows = sweep.context, sweep.context.rows
    whole = ctx._replace(param=rows.gather(ctx.param), rows=HERE)
    direction = group["method"].update(rows.gather(sweep.whole()), sweep.state, whole)
    sweep.descend(slice(None), rows.mine(direction))


def _step_by_owners(owned: list[tuple[Method, Sweep]]) -> None:
    from gossamer.distributed.owners import Job, run

    def parts(method: Any, sweep: Sweep) -> Parts:  # begun when it is its turn: until then nothing is copied
        return (yield from method.parts(sweep.whole(), sweep.state, sweep.context))

    jobs = []
    for method, sweep in owned:
        rows: Any = sweep.context.rows
        m, n = rows.shape(sweep.grad)
        jobs.append(Job(parts(method, sweep), rows, m * n * min(m, n), partial(sweep.descend, slice(None))))
    run(jobs)


def _check_shape(name: str, param: Tensor, method: Method) -> None:
    if (reason := refusal(method, param.shape)) is None:
        return
    what = f"Optimizer: {name!r} of shape {tuple(param.shape)} is {reason}, and {contract.entry_of(method).name} trains"
    if is_flattened(param):
        raise UserError(f"{what} matrices: FSDP1 or DeepSpeed ZeRO flattened it; shard with {SHARD_WITH}")
    raise UserError(f"{what} matrices; let gossamer.param_groups(model, method) sort the parameters")


def _norm(tensors: Iterable[Tensor]) -> float:
    norms = [sharding.norm(tensor) for tensor in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _check_shapes(label: str, saved: State, fresh: State) -> None:
    for key, tensor in fresh.items():
        shape = tuple(saved[key].shape) if key in saved else None
        if shape != tuple(tensor.shape):
            raise UserError(
                f"load_state_dict: {label!r} has {key} of shape {shape} in the checkpoint but "
                f"{tuple(tensor.shape)} here; build the optimizer with the checkpoint's rank and model"
            )
