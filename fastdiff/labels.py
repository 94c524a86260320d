"""Class labels as people ask for them, checked and repeated."""

from __future__ import annotations

from collections.abc import Sequence

from fastdiff.errors import ShapeError

MAX_BATCH = 4096


def check_labels(
    given: int | Sequence[int] | None, repeat: int, count: int, null: int | None, labelled: bool
) -> list[int | None]:
    """Check labels and repeat each; ``[None]`` stands for one image of a model without classes.

    Args:
        given: one label, several, or None for "any".
        repeat: images for each.
        count: labels there are, 0 to ``count - 1``.
        null: the label that means "no class", which None becomes.
        labelled: does the network read labels at all?

    Raises:
        ShapeError: naming the first label the model does not know, or a number of images out of range.
    """
    if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
        raise ShapeError(f"num_images_per_prompt is {repeat!r}; allowed: a whole number, 1 or more")
    labels = [given] if given is None or isinstance(given, int) else list(given)
    if not labels or len(labels) * repeat > MAX_BATCH:
        raise ShapeError(f"{len(labels) * repeat} images asked for; allowed: 1 to {MAX_BATCH} in one call")
    for label in labels:
        if label is None and labelled and null is None:
            raise ShapeError(f"class label is None; allowed: 0 to {count - 1}, as this model has no null label")
        if label is not None and (isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count):
            allowed = f"0 to {count - 1}" if count else "none: the model has no classes"
            raise ShapeError(f"class label is {label!r}; allowed: {allowed}")
    return [null if label is None else label for label in labels for _ in range(repeat)]
