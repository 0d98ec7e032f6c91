"""Processes: the only room that mentions a rank."""

from gossamer.distributed.process import World, put_, start, stop, whole

__all__ = ["World", "put_", "start", "stop", "whole"]
