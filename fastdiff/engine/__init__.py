"""Many requests, one model: step-level batching with the same bits for the same seed."""

from fastdiff.engine.aio import AsyncEngine
from fastdiff.engine.bucket import Stats, Turn
from fastdiff.engine.engine import Engine
from fastdiff.engine.ticket import Preview, Ticket

__all__ = ["AsyncEngine", "Engine", "Preview", "Stats", "Ticket", "Turn"]
