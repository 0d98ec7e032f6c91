"""What a forward pass keeps for its backward pass, counted by running both on tensors that hold no data."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gossamer.errors import UserError, first_line
from gossamer.layers import Parametrization
from gossamer.memory.predict import meta_model
from gossamer.models import longest_row

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""A function of a model, inputs and targets, both (batch_size, seq_len) int64: `gossamer.evaluate.token_loss`."""

_FUSED = "gossamer fused causal"


def activations(
    model: nn.Module | PretrainedConfig | str,
    batch_size: int,
    seq_len: int,
    checkpointing: bool = False,
    *,
    loss: Loss,
    layers: Parametrization | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes that autograd holds at most for one micro-batch, beside parameters and buffers.

    Nothing is estimated: the model's own forward pass and `loss` run on fake tensors, and every storage saved for the
    backward pass is counted once, those of the output head and the loss included. Where all decoder layers are alike,
    the model runs with one and with two of them, and the others add the difference. Attention by torch's
    `scaled_dot_product_attention` counts as a fused causal kernel, without scores; eager attention counts in full.
    Not counted: temporaries of a single operation, gradients of activations, what an allocator wastes.

    Args:
        model: a module, which is left as it is; or a configuration, a size or a path, built in `dtype`.
        batch_size, seq_len: rows of one forward pass, and the tokens of a row.
        checkpointing: of every decoder layer, as `model.gradient_checkpointing_enable()` does it: kept are the layers'
            inputs and what one layer, recomputed, keeps (or, if that is more, what follows the last layer).
        loss: what is trained: `gossamer.evaluate.token_loss` in `gossamer pretrain`.
        layers, dtype: as for `predict`.

    Raises:
        UserError: sizes out of range, a model that does not run or cannot be checkpointed.
    """
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise UserError(f"{name}: {value} is too small; allowed: an integer >= 1")
        if value >= 2**31:
            raise UserError(f"{name}: {value} is too large; allowed: an integer below 2^31")
    model = meta_model(model, layers, dtype)
    config = getattr(model, "config", None)
    longest = None if config is None else longest_row(config)
    if longest is not None and seq_len > longest:
        raise UserError(f"seq_len: {seq_len} is longer than the model allows: {longest}")
    with FakeTensorMode(allow_non_fake_inputs=True), _NoData():
        twin = _fake(model).train()
        _fuse_attention(twin)
        if checkpointing:
            # the reentrant kind recomputes under our hooks; the other keeps the same tensors, but out of their sight
            enable_checkpointing(twin, use_reentrant=True)

        def count() -> int:
            kept = _Kept(twin)
            try:
                inputs, targets = (torch.zeros(batch_size, seq_len, dtype=torch.int64) for _ in range(2))
                with torch.autograd.graph.saved_tensors_hooks(kept.pack, _Saved.unpack):
                    value = loss(twin, inputs, targets)
                    if checkpointing:  # else everything is held when the forward pass ends
                        value.backward()
            except RuntimeError as error:
                raise UserError(f"activations: {type(model).__name__} does not run: {first_line(error)}") from error
            return kept.peak

        return _over_layers(twin, count)


def operations(
    model: nn.Module | PretrainedConfig | str,
    batch_size: int,
    seq_len: int,
    *,
    loss: Loss,
    layers: Parametrization | None = None,
) -> int:
    """Floating-point operations of the matrix products in a forward and a backward pass of one micro-batch.

    Counted as `activations` counts, by running both on fake tensors. What is no matrix product is left out, and so is
    attention, which is one fused operator.

    Args:
        model, batch_size, seq_len, loss, layers: as for `activations`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _NoData():
        twin = _fake(meta_model(model, layers, torch.float32)).train()
        _fuse_attention(twin)

        def count() -> int:
            inputs, targets = (torch.zeros(batch_size, seq_len, dtype=torch.int64) for _ in range(2))
            with FlopCounterMode(display=False) as counter:
                loss(twin, inputs, targets).backward()
            return counter.get_total_flops()

        return _over_layers(twin, count)


def _over_layers(model: nn.Module, count: Callable[[], int]) -> int:
    """A count of the whole model: where all decoder layers are alike, from its counts with one and with two of them."""
    stack = _stack_of_alike(model)
    if stack is None:
        return count()
    parent, name, stacked = stack
    counts = []
    for depth in (1, 2):
        setattr(parent, name, stacked[:depth])
        counts.append(count())
    return counts[1] + (len(stacked) - 2) * (counts[1] - counts[0])


class _NoData(TorchDispatchMode):
    """Where code asks for the value of a number (`item()`), say 0: fake tensors have none and would raise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 0 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **kwargs or {})


class _Kept:
    """The storages that saved tensors hold, each counted once; in bytes."""

    def __init__(self, model: nn.Module) -> None:
        self.free = {_storage(tensor) for tensor in chain(model.parameters(), model.buffers())}
        self.holders: Counter[int] = Counter()
        self.bytes = self.peak = 0

    def pack(self, tensor: Tensor) -> _Saved:
        key = _storage(tensor)
        if key not in self.free:
            self.bytes += 0 if self.holders[key] else tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.bytes)
            self.holders[key] += 1
        return _Saved(tensor.detach(), self)  # itself, it would hold the node that holds it

    def drop(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        if key not in self.free:
            self.holders[key] -= 1
            if not self.holders[key]:
                del self.holders[key]  # the address may be another storage's next
                self.bytes -= tensor.untyped_storage().nbytes()


class _Saved:
    """One saved tensor: autograd lets go of it as soon as its node has run backward."""

    def __init__(self, tensor: Tensor, kept: _Kept) -> None:
        self.tensor, self.kept = tensor, kept

    def unpack(self) -> Tensor:
        return self.tensor

    def __del__(self) -> None:
        self.kept.drop(self.tensor)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _fake(model: nn.Module) -> nn.Module:
    """A copy of a model on fake CPU tensors, whatever the model's own device."""
    tensors: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        tensors[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return copy.deepcopy(model, tensors)  # finds its tensors copied already


def _fuse_attention(model: nn.Module) -> None:
    """Keep transformers from making a mask of seq_len x seq_len.

    It makes none where it finds that rows are not packed, but there is no looking at fake tensors.
    """
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != "sdpa":
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_FUSED, sdpa_attention_forward)
    AttentionMaskInterface.register(_FUSED, lambda *args, **kwargs: None)
    model.set_attn_implementation(_FUSED)  # pyright: ignore


def _stack_of_alike(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The decoder layers of a transformers model, with their parent and name in it, if they are all alike."""
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth and len(child) > 2:
                first, *others = (_anatomy(layer) for layer in child)
                return (parent, name, child) if all(other == first for other in others) else None
    return None


def _anatomy(layer: nn.Module) -> tuple[list[Any], list[Any]]:
    tensors = chain(layer.named_parameters(), layer.named_buffers())
    return (
        [(name, type(module)) for name, module in layer.named_modules()],
        [(name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors],
    )


def enable_checkpointing(model: nn.Module, *, use_reentrant: bool) -> None:
    """Recompute every decoder layer of a transformers model in its backward pass.

    Raises:
        UserError: a model that cannot.
    """
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise UserError(f"checkpointing: {type(model).__name__} has no gradient_checkpointing_enable()")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is not in transformers 5.0
            enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    except ValueError as error:
        raise UserError(f"checkpointing: {first_line(error)}") from error
