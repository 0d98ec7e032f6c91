"""Processes: the only room that mentions a rank."""

from gossamer.distributed.process import World, start, stop

__all__ = ["World", "start", "stop"]
