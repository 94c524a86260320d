"""What a pipeline's call takes: its arguments by name, for runs that their caller walks, and prompts as lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from fastdiff.errors import PlanError

Prompt = str | Sequence[str]


def arguments_of_a_run(call: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    """The arguments of a pipeline's call by name, defaults included, without those that only a whole call has.

    Raises:
        PlanError: if one of those is given, or an option is unknown.
    """
    try:
        bound = inspect.signature(call).bind(*arguments, **options)
    except TypeError as error:
        raise PlanError(f"a run does not take these options: {error}") from error
    bound.apply_defaults()
    given = bound.arguments
    for name in ("output_type", "callback_on_step_end"):
        if name in options:
            raise PlanError(f"{name} belongs to a call, not to a run that its caller walks")
        del given[name]
    return given


def listed(prompt: Prompt) -> list[str]:
    """One prompt or several, as a list.

    Raises:
        PlanError: if it is neither a text nor a list of texts.
    """
    found = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
    if not found or not all(isinstance(text, str) for text in found):
        raise PlanError(f"prompt is {prompt!r}; allowed: a text, or a list of texts")
    return found
