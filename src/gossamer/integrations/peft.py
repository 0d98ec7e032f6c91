"""LoRA layers of ours as an adapter that the `peft` library opens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import safetensors.torch
from torch import nn

from gossamer.errors import UserError
from gossamer.layers import LoRALinear, factored


def save_peft(model: nn.Module, folder: str | Path, base: str) -> list[str]:
    """Write `adapter_model.safetensors` and `adapter_config.json`; returns the names of the adapted layers.

        layers.apply(model, layers.LoRA(rank=16), ["q_proj", "v_proj"])  # of a model that was loaded from `base`
        ...
        save_peft(model, "adapter", base)
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "adapter")

    Args:
        folder: made if it is not there.
        base: folder or hub name of the model that training started from; the adapter names it and does not hold it.

    Raises:
        UserError: no LoRA layer, low-rank layers of another kind, or trained parameters beside the factors, all of
            which an adapter would leave out.
    """
    layers = dict(factored(model))
    for name, layer in layers.items():
        if type(layer) is not LoRALinear:  # ReLoRA changes the frozen weight, the others have none
            raise UserError(
                f"save_peft: {name} is a {type(layer).__name__}; an adapter holds LoRALinear only, "
                "layers.dense_state_dict the whole model"
            )
    if not layers:
        raise UserError(f"save_peft: {type(model).__name__} has no LoRA layer; see gossamer.layers.apply")
    held = {id(factor) for layer in layers.values() for factor in (layer.A, layer.B)}
    left = [name for name, param in model.named_parameters() if param.requires_grad and id(param) not in held]
    if left:
        raise UserError(
            f"save_peft: {left[0]} and {len(left) - 1} more are trained, and an adapter would leave them out; "
            "freeze them before training (requires_grad_(False))"
        )
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": factor.detach().contiguous()
        for name, layer in layers.items()
        for letter, factor in (("A", layer.A), ("B", layer.B))
    }
    sizes = {name: (layer.rank, layer.scale * layer.rank) for name, layer in layers.items()}
    rank, alpha = next(iter(sizes.values()))
    others = {f"^{re.escape(name)}": size for name, size in sizes.items() if size != (rank, alpha)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": list(layers),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {pattern: size[0] for pattern, size in others.items()},
        "alpha_pattern": {pattern: size[1] for pattern, size in others.items()},
        "bias": "none",
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, str(Path(folder) / "adapter_model.safetensors"), metadata={"format": "pt"})
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return list(layers)
