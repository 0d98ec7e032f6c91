"""What the processes of test_shards.py do. They run this file, from the bottom; each function is collective."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import gossamer
from gossamer.optim.contract import Context, State, build

F64 = torch.float64
NAMES = list(gossamer.methods())
VARIANTS: dict[str, dict[str, Any]] = {
    "gossamer square": {"second": "square"},
    "gossamer absolute": {"second": "absolute"},
    "gossamer dense": {"second": "dense", "tail": 0.0},
    "galore warm": {"refresh": "warm"},
    "fira warm": {"refresh": "warm", "residual": "paper"},
    "golore late": {"random_after": 1, "staggered": True},
    "ldadam plain": {"error_feedback": False},
    "mlorc exact": {"oversampling": 2, "power_iterations": 1},
    "muon plain": {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
    "adam-mini tensor": {"blocks": "tensor"},
    "adam-mini one": {"blocks": 1},
    "adam-mini blocks": {"blocks": 3},
}
"""Choices beside the defaults that reduce over rows in another way."""
STRANGER = "stranger"
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "1": {"tall": (6, 4), "wide": (4, 6)},
    "2": {"tall": (11, 5), "wide": (5, 12), "square": (6, 6), "empty": (1, 9), "vector": (7,)},
    "4": {"tall": (11, 5), "wide": (6, 10), "square": (8, 8), "empty": (3, 2), "vector": (6,)},
    "2x2": {"tall": (7, 5), "empty": (1, 4)},
}
"""By mesh. Over 2: even, uneven and empty shards; over 4: 3 3 3 2, 2 2 2 0, 2 2 2 2 and 1 1 1 0 rows."""
STEPS = 5
"""With `often`: bases are refreshed at steps 1 and 4, moments of SPAM reset; the gradient of step 3 is zero."""


def register_stranger() -> None:
    """A method that divides by the norm of all its momentum, and says nothing of rows."""

    @gossamer.register(STRANGER, paper="none")
    @dataclass(frozen=True)
    class Stranger:
        """Normalised momentum."""

        def init(self, param: Tensor) -> State:
            return {"m": torch.zeros_like(param), "start": param.new_ones(param.shape[1])}

        def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
            m = state["m"].lerp_(grad + 0.1 * ctx.param * state["start"], 0.1)
            return m / m.norm()


def make(name: str) -> gossamer.Method:
    known = gossamer.methods()[name.split()[0]].cls.__dataclass_fields__
    often = {"rank": 2, "update_proj_gap": 3, "reset_gap": 3}
    fields = {field: value for field, value in often.items() if field in known}
    return build(name.split()[0], **{**fields, **VARIANTS.get(name, {})})


def takes(name: str, shape: tuple[int, ...]) -> bool:
    if name == "adam-mini blocks":
        return shape[0] % 3 == 0
    return len(shape) == 2 or not gossamer.methods()[name.split()[0]].matrix_only


def start(shape: tuple[int, ...], dtype: torch.dtype = F64) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=F64).reshape(shape).to(dtype)


def gradients(shape: tuple[int, ...], steps: int = STEPS, dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    signal, *noises = (torch.randn(shape, generator=generator, dtype=F64) for _ in range(steps + 1))
    return [((signal + noise) * (step != 2)).to(dtype) for step, noise in enumerate(noises)]


def placements(mesh: DeviceMesh) -> list[Any]:
    return [*[Replicate()] * (mesh.ndim - 1), Shard(0)]


def sharded(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return distribute_tensor(x, mesh, placements(mesh))


def optimizer(name: str, param: Tensor, **options: Any) -> gossamer.Optimizer:
    group = {"params": [("w", param)], "method": make(name)}
    return gossamer.Optimizer([group], **{"lr": 1e-2, "weight_decay": 0.1, "implementation": "reference", **options})


def trained(name: str, shape: tuple[int, ...], mesh: DeviceMesh | None, **options: Any) -> tuple[Tensor, Any]:
    """The weight after STEPS steps, and the optimizer."""
    place: Callable[[Tensor], Tensor] = (lambda x: x) if mesh is None else (lambda x: sharded(x, mesh))
    grads = options.pop("grads", None) or gradients(shape, dtype=options.get("dtype", F64))
    param = nn.Parameter(place(start(shape, options.pop("dtype", F64))))
    opt = optimizer(name, param, **options)
    for grad in grads:
        param.grad = place(grad)
        opt.step()
    return full(param), opt


def full(x: Tensor) -> Tensor:
    return (x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()).clone()


def keys(opt: gossamer.Optimizer) -> dict[str, Any]:
    return {key: tuple(value.shape) for state in opt.state.values() for key, value in state.items()}


def agrees(kind: str) -> dict[str, Any]:
    """(name, shape) -> the weight of many processes, of one, how it was stepped, keys and shapes of the state."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, 2) if kind == "2x2" else (size,))
    names = [*NAMES, STRANGER, *(VARIANTS if kind == "2" else ())]
    found = {}
    for name in names:
        for shape_name, shape in SHAPES[kind].items():
            if takes(name, shape):
                ours, opt = trained(name, shape, mesh)
                one, alone = trained(name, shape, None)
                assert keys(opt) == keys(alone)
                found[name, shape_name] = ours, one, opt.plan()[0].implementation, keys(opt)
    return found


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


# --- traffic ---

TRAFFIC = {"tall": (96, 64), "wide": (64, 96)}
RANK = 4


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """The collectives that this process takes part in, and their bytes: all that are gathered, else what it gives."""
    found: list[tuple[str, int]] = []
    real = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast", "all_to_all_single")}

    def counting(name: str) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **options: Any) -> Any:
            handed = rest[0] if name == "all_to_all_single" else first
            found.append((name, sum(t.nbytes for t in handed) if isinstance(handed, list) else handed.nbytes))
            return real[name](first, *rest, **options)

        return call

    for name in real:
        setattr(dist, name, counting(name))
    try:
        yield found
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def traffic() -> dict[str, Any]:
    """(name, shape) -> fp32 numbers of an ordinary step and of one with a refresh: sent by me, and shared by all."""
    mesh, found = mesh_of_all(), {}
    for name in NAMES:
        cls = gossamer.methods()[name].cls
        known = cls.__dataclass_fields__
        fields = {"rank": RANK} if "rank" in known else {}
        method = build(name, **fields, **({"update_proj_gap": 3} if "update_proj_gap" in known else {}))
        for kind, shape in TRAFFIC.items():
            param = nn.Parameter(sharded(start(shape, torch.float32), mesh))
            opt = gossamer.Optimizer([{"params": [("w", param)], "method": method}], lr=1e-3)
            numbers = []
            for grad in gradients(shape, 4, torch.float32):
                param.grad = sharded(grad, mesh)
                with CommDebugMode() as seen, counted() as calls:
                    opt.step()
                assert seen.get_total_counts() == len(calls), (name, seen.get_comm_counts(), calls)
                mine = [size / 4 for call, size in calls if call == "all_to_all_single"]
                numbers.append((sum(mine), sum(size / 4 for _, size in calls) - sum(mine)))
            found[name, kind] = numbers[1], numbers[0]
    return found


# --- many matrices, models ---


def many() -> dict[str, Any]:
    """Several matrices and vectors of both kinds at once: name -> weights of many processes, and of one."""
    shapes = [(11, 5), (4, 7), (9, 9), (2, 6), (16, 3)]
    mesh, found = mesh_of_all(), {}
    for name in NAMES:
        results = []
        for place in (lambda x: sharded(x, mesh), lambda x: x):
            params = [nn.Parameter(place(start(shape))) for shape in shapes]
            group = {"params": [(f"w{i}", p) for i, p in enumerate(params)], "method": make(name)}
            opt = gossamer.Optimizer([group], lr=1e-2, implementation="reference")
            for grads in zip(*(gradients(shape, 4) for shape in shapes), strict=True):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = place(grad)
                opt.step()
            results.append([full(p) for p in params])
        found[name] = results
    return found


class Forest(nn.ModuleDict):
    """A small network for every method, all trained at once."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            torch.manual_seed(0)
            self[name] = nn.Sequential(nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 3))
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([tree(x) for tree in self.values()])


def fully_sharded(net: Forest, mesh: DeviceMesh) -> Forest:
    for tree in net.values():
        fully_shard(tree, mesh=mesh)
    return fully_shard(net, mesh=mesh)  # pyright: ignore


def gardener(net: Forest) -> gossamer.Optimizer:
    groups = []
    for name in NAMES:
        for group in gossamer.param_groups(net[name], make(name)):
            group["param_names"] = [f"{name}.{key}" for key in group["param_names"]]
            groups.append(group)
    return gossamer.Optimizer(groups, lr=1e-2, weight_decay=0.1, implementation="reference")


def train(net: nn.Module, opt: gossamer.Optimizer, steps: range, rank: int = 0, size: int = 1) -> None:
    """Each process sees its part of the batch; their gradients are averaged."""
    for step in steps:
        batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(step), dtype=F64)
        rows = batch[rank * 8 // size : (rank + 1) * 8 // size]
        opt.zero_grad()
        (net(rows) - rows[:, :3].sin()).square().mean((1, 2)).sum().backward()
        opt.step()
    opt.zero_grad()  # DCP makes no state where there are gradients


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {key: full(p) for key, p in net.named_parameters()}


def parallel() -> list[dict[str, Tensor]]:
    """Weights under FSDP2, under FSDP2 prepared as accelerate does, and under DDP."""
    place, mesh = (dist.get_rank(), dist.get_world_size()), mesh_of_all()
    fsdp = fully_sharded(Forest(), mesh)
    train(fsdp, gardener(fsdp), range(4), *place)

    swapped = Forest()  # the optimizer is built before the model is sharded, and given the new parameters then
    opt = gardener(swapped)
    params = dict(fully_sharded(swapped, mesh).named_parameters())
    for group in opt.param_groups:
        group["params"] = [params[key] for key in group["param_names"]]
    train(swapped, opt, range(4), *place)

    inner = Forest()
    train(DistributedDataParallel(inner), gardener(inner), range(4), *place)
    return [weights(net) for net in (fsdp, swapped, inner)]


def checkpoints(steps: str, before: str, after: str) -> dict[str, Any]:
    """Load what was saved in `before`, if anything, take steps, and save in `after`.

    State and weights, whole, as loaded and as saved; and my parts of them as saved, and as loaded again from one piece
    and by `load_state_dict`.
    """
    place, net = (dist.get_rank(), dist.get_world_size()), fully_sharded(Forest(), mesh_of_all())
    first, last = map(int, steps.split("-"))
    opt, flat = gardener(net), StateDictOptions(flatten_optimizer_state_dict=True)
    if before:
        saved = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, opt, options=flat)}
        dcp.load(saved, checkpoint_id=before)
        set_model_state_dict(net, saved["model"])
        set_optimizer_state_dict(net, opt, saved["optimizer"], options=flat)
    loaded = contents(net, opt)
    train(net, opt, range(first, last), *place)
    saved = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, opt, options=flat)}
    dcp.save(saved, checkpoint_id=after)

    whole, one_piece = StateDictOptions(full_state_dict=True), gardener(net)
    set_optimizer_state_dict(net, one_piece, get_optimizer_state_dict(net, opt, options=whole), options=whole)
    copied = gardener(net)
    copied.load_state_dict(opt.state_dict())
    parts = [contents(net, each, local) for each in (opt, one_piece, copied)]
    return {"loaded": loaded, "saved": contents(net, opt), "parts": parts}


def local(x: Tensor) -> Tensor:
    return (x.detach().to_local() if isinstance(x, DTensor) else x.detach()).clone()


def contents(net: nn.Module, opt: gossamer.Optimizer, how: Callable[[Tensor], Tensor] = full) -> dict[str, Tensor]:
    """Every tensor of the weights and the state under its name."""
    state = {f"{name} {key}": how(t) for name, p, _ in opt.members() for key, t in opt.state.get(p, {}).items()}
    return {**{key: how(p) for key, p in net.named_parameters()}, **state}


# --- what else may happen ---


def extremes() -> dict[str, Any]:
    """(name, kind) -> weight of many, of one, and every tensor of the state that each process has all of."""
    mesh, found = mesh_of_all(), {}
    for name in NAMES:
        for kind, value in {"nan": torch.nan, "huge": 1e300}.items():
            grads = gradients((11, 5), 3)
            grads[1][-1, 2] = value  # in the rows of one process
            ours, opt = trained(name, (11, 5), mesh, grads=grads)
            one, _ = trained(name, (11, 5), None, grads=grads)
            (state,) = opt.state.values()
            shared = {
                key: t.to_local()
                for key, t in state.items()
                if isinstance(t, DTensor) and t.placements == (Replicate(),)
            }
            found[name, kind] = ours, one, shared
    return found


def rounding() -> dict[str, Any]:
    """bf16: elementwise methods rounded to nearest, of many and of one; and alike rows rounded stochastically."""
    mesh, found = mesh_of_all(), {}
    for name in ("adamw", "lion", "spam", "adamw-8bit"):
        pair = [trained(name, (11, 5), m, dtype=torch.bfloat16, rounding="nearest")[0] for m in (mesh, None)]
        found[name] = pair
    for name in NAMES:
        param = nn.Parameter(sharded(torch.ones(8, 64, dtype=torch.bfloat16), mesh))
        opt = optimizer(name, param, weight_decay=0.0, lr=1e-3)
        param.grad = sharded(torch.ones(8, 64, dtype=torch.bfloat16), mesh)
        opt.step()
        found[f"{name} stochastic"] = full(param)
    return found


def asked_for_state() -> list[dict[str, Tensor]]:
    """Weights after two steps, where the state was asked for before the first, and where it was not."""
    results = []
    for asks in (True, False):
        net = fully_sharded(Forest(), mesh_of_all())
        opt = gardener(net)
        if asks:
            before = weights(net)
            state = get_optimizer_state_dict(net, opt)["state"]
            assert all(torch.equal(before[key], value) for key, value in weights(net).items())
            assert all(full(t).count_nonzero() == 0 for held in state.values() for t in held.values())
        train(net, opt, range(2), dist.get_rank(), dist.get_world_size())
        results.append(weights(net))
    return results


def resets() -> dict[str, Any]:
    """name -> what `Optimizer.reset` reported on many processes and on one, and the weights a step later."""
    mesh, found = mesh_of_all(), {}
    for name in NAMES:
        results = []
        for place in (lambda x: sharded(x, mesh), lambda x: x):
            param = nn.Parameter(place(start((11, 5))))
            opt = optimizer(name, param)
            for step, grad in enumerate(2 * gradients((11, 5), 2)):
                if step == 2:
                    report = opt.reset(["w"], ["m"])
                param.grad = place(grad)
                opt.step()
            results.append((tuple(report), full(param)))  # pyright: ignore
        found[name] = results
    return found


def refusals() -> dict[str, str]:
    mesh, found = mesh_of_all(), {}

    def refused(key: str, attempt: Callable[[], Any]) -> None:
        try:
            attempt()
        except gossamer.UserError as error:
            found[key] = str(error)

    def stepped(param: Tensor, grad: Tensor, **observers: Any) -> None:
        leaf = nn.Parameter(param)
        opt = optimizer("gossamer", leaf)
        opt.observers = tuple(observers.values())
        leaf.grad = grad
        opt.step()

    x = torch.ones(6, 4)
    columns = distribute_tensor(x, mesh, [Shard(1)])
    refused("columns", lambda: stepped(columns, columns))
    rows = sharded(x, mesh)
    partial = DTensor.from_local(x, mesh, [Partial()])
    refused("partial", lambda: stepped(partial, partial))
    refused("observed", lambda: stepped(rows, rows, look=print))
    return found


def child(work: str, rank: int, variables: dict[str, str], file: str) -> None:
    """`work`: names of functions with their arguments, as `agrees:4 many`."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        register_stranger()
        results = {}
        for part in work.split():
            name, *arguments = part.split(":")
            results[name + "".join(arguments[:1])] = globals()[name](*arguments)
        torch.save(results, file)
    finally:
        dist.destroy_process_group()


if __name__ == "__child__":
    child(*globals()["options"])
