"""Model shapes as data, and any causal language model of `transformers` built from a configuration."""

from gossamer.models.pretrained import head_width, load_model, load_tokenizer, locate, new_parts
from gossamer.models.shapes import SHAPES, Shape, build_model, resolve_config

__all__ = [
    "SHAPES",
    "Shape",
    "build_model",
    "head_width",
    "load_model",
    "load_tokenizer",
    "locate",
    "new_parts",
    "resolve_config",
]
