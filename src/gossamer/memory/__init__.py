"""What training takes: predicted on the meta device, in bytes."""

from gossamer.memory.predict import Line, Memory, predict

__all__ = ["Line", "Memory", "predict"]
