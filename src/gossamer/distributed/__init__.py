"""Processes: the only room that mentions a rank."""

from gossamer.distributed.process import World, local, of_main, put_, start, stop, whole

__all__ = ["World", "local", "of_main", "put_", "start", "stop", "whole"]
