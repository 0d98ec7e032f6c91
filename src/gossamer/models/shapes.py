"""The Llama sizes that the papers pre-train, and two that a laptop trains: `tiny` in a minute, `small` in ten."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gossamer.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """A Llama: untied embeddings, no biases, RMSNorm eps 1e-6, SwiGLU, RoPE base 10000, weights ~ N(0, 0.02^2)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int = 32000


SHAPES = {
    # hidden matrices are 60 % of the parameters of `tiny`, as they are not at 9m: 8 MB of embeddings would hide them
    "tiny": Shape(128, 352, 4, 4, vocab=2048),
    "small": Shape(256, 688, 8, 4, vocab=4096),
    # from GaLore's configs (Zhao et al. 2024, appendix) and the benchmark of arXiv 2505.22922
    "9m": Shape(128, 352, 4, 4),
    "20m": Shape(256, 688, 4, 4),
    "35m": Shape(384, 1024, 6, 8),
    "40m": Shape(416, 1024, 8, 8),
    "60m": Shape(512, 1376, 8, 8),
    "71m": Shape(512, 1368, 12, 8),
    "100m": Shape(640, 1708, 12, 10, vocab=32100),
    "130m": Shape(768, 2048, 12, 12),
    "250m": Shape(768, 2560, 24, 16),
    "350m": Shape(1024, 2736, 24, 16),
    "1b": Shape(2048, 5461, 24, 32),
    "3b": Shape(2560, 6848, 32, 32),
    "7b": Shape(4096, 11008, 32, 32),
    "13b": Shape(5120, 13824, 40, 40),
}
"""By the name that the command line knows."""


def resolve_config(model: str) -> PretrainedConfig:
    """The `transformers` configuration of a name in `SHAPES`, a configuration file, or a folder that holds one.

    Raises:
        UserError: neither a known name nor a readable configuration.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    if shape := SHAPES.get(model):
        return LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            initializer_range=0.02,
            tie_word_embeddings=False,
            use_cache=False,
            # a padding index would freeze that row of the embedding at zero; padding is masked in the loss instead
            pad_token_id=None,
        )
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"model: {model!r} is neither a size{nearest(model, SHAPES)} nor a Hugging Face config.json or a folder "
            f"with one; sizes: {', '.join(SHAPES)}"
        )
    config = read_config(file)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"model: {file} is not a model configuration: {config.model_type} has no causal language model")
    return config


def read_config(file: Path) -> PretrainedConfig:
    """The `transformers` configuration in a file.

    Raises:
        UserError: it holds none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**json.loads(file.read_text()))
    except Exception as error:  # whatever the configuration's own checks raise: it is the user's file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model: {file} is not a model configuration: {reason}") from error


def longest_row(config: PretrainedConfig) -> int | None:
    """The tokens of a row that a model's configuration allows, or None if it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config  # a model's of one's own
    return getattr(text, "max_position_embeddings", None)


def check_row(option: str, length: int, config: PretrainedConfig, model: str) -> None:
    """Refuse rows that are longer than a model allows.

    Raises:
        UserError: they are; it names the option.
    """
    longest = longest_row(config)
    if longest is not None and length > longest:
        raise UserError(f"{option}: {length} is longer than model {model!r} allows: {longest}")


def build_model(
    config: PretrainedConfig, *, dtype: torch.dtype, device: str | torch.device, seed: int
) -> PreTrainedModel:
    """A freshly initialised causal language model; the global random state is left as it was.

    Args:
        dtype: of the weights, fp32 or bf16. The weights are drawn in fp32 and then cast.
        device: "meta" builds it without memory.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.dtype = dtype  # so that what is saved is loaded as it was
    for param in model.parameters():  # not the buffers: rotary frequencies rounded to bf16 turn positions askew
        param.data = param.data.to(dtype)
    return model
