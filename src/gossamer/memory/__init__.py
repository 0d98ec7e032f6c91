"""What training takes, in bytes, found out without taking it: weights, gradients, state, activations, a step; and
what a step, or training, takes, measured."""

from gossamer.memory.activations import activations, operations
from gossamer.memory.budget import Candidate, Size, candidates, parse_size
from gossamer.memory.measure import Measured, Training, measure_step, measure_training, meter
from gossamer.memory.predict import BUFFERS, FROZEN, Line, Memory, meta_model, predict
from gossamer.memory.step import Alive, Step

__all__ = [
    "BUFFERS",
    "FROZEN",
    "Alive",
    "Candidate",
    "Line",
    "Measured",
    "Memory",
    "Size",
    "Step",
    "Training",
    "activations",
    "candidates",
    "measure_step",
    "measure_training",
    "meta_model",
    "meter",
    "operations",
    "parse_size",
    "predict",
]
