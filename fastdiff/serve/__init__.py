"""HTTP: the images API that clients already speak, in front of an engine. Needs the extra ``serve``."""

from fastdiff.serve.app import create_app
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.models import ClassConditional, Served
from fastdiff.serve.prompts import TextConditional, served_of
from fastdiff.serve.settings import Settings

__all__ = ["ClassConditional", "Metrics", "Served", "Settings", "TextConditional", "create_app", "served_of"]
