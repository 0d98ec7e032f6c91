"""Model shapes as data, and any causal language model of `transformers` built from a configuration."""

from gossamer.models.pretrained import head_width, load_model, load_tokenizer, locate, new_parts
from gossamer.models.shapes import SHAPES, Shape, build_model, check_row, longest_row, read_config, resolve_config

__all__ = [
    "SHAPES",
    "Shape",
    "build_model",
    "check_row",
    "head_width",
    "load_model",
    "load_tokenizer",
    "locate",
    "longest_row",
    "new_parts",
    "read_config",
    "resolve_config",
]
