"""What training takes, in bytes, found out without taking it: weights, gradients, optimizer state, activations."""

from gossamer.memory.activations import activations, longest_row
from gossamer.memory.budget import Candidate, Size, candidates, parse_size
from gossamer.memory.predict import BUFFERS, FROZEN, Line, Memory, meta_model, predict

__all__ = [
    "BUFFERS",
    "FROZEN",
    "Candidate",
    "Line",
    "Memory",
    "Size",
    "activations",
    "candidates",
    "longest_row",
    "meta_model",
    "parse_size",
    "predict",
]
