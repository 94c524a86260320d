"""What a request becomes: the one place that knows what kind of model is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from fastdiff.calibration.file import CALIBRATED, place_of
from fastdiff.errors import BackendError
from fastdiff.pipeline import Pipeline
from fastdiff.sampling import SOLVERS
from fastdiff.serve.errors import Refused
from fastdiff.serve.schema import ImageRequest, Order
from fastdiff.text_to_image import TextToImage

NOT_FROM_NOISE = ("ddim_inversion",)


def samplers(folder: Path | None) -> tuple[str, ...]:
    """The samplers that a model of this folder may be asked for."""
    calibrated = (CALIBRATED,) if folder is not None and place_of(folder).is_file() else ()
    return (*(sampler for sampler in SOLVERS if sampler not in NOT_FROM_NOISE), *calibrated)


class Served(Protocol):
    """A model behind a server."""

    name: str
    samplers: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]  # heights and widths that the engine has to plan for; none: the model's own

    @property
    def pipeline(self) -> Pipeline | TextToImage:
        """What the engine runs."""

    def order(self, request: ImageRequest) -> Order:
        """What to ask the engine for. Called in a worker thread, one request at a time: it may take a while.

        Raises:
            Refused: naming the first field that does not fit the model.
        """

    def facts(self) -> dict[str, Any]:
        """What people want to know of the model, see ``schema.ModelCard``."""

    def picture(self, x: Tensor, preview: bool = False) -> Image.Image:
        """What the loop ends with ``[1, C, H, W]``, or a preview, as a picture.

        Called in a worker thread, one image at a time.

        Raises:
            NotFinite: if there is none in it.
        """


class ClassConditional:
    """A model that draws classes, or one thing only.

    Args:
        pipeline: the model.
        name: what clients call it.

    Raises:
        BackendError: if the model says not how large its images are.
    """

    def __init__(self, pipeline: Pipeline, name: str):
        self.pipeline, self.name, self.samplers = pipeline, name, samplers(pipeline.model.folder)
        self.sizes: tuple[tuple[int, int], ...] = ()
        side = pipeline.model.network.config.sample_size
        if side is None:
            raise BackendError("config.json of this model has no sample_size, so it says not how large its images are")
        side -= 2 * pipeline.model.info.crop
        self._size = f"{side}x{side}"

    def order(self, request: ImageRequest) -> Order:
        """See ``Served.order``."""
        classes = len(self.pipeline.model.info.classes)
        instead = f"give class_label, 0 to {classes - 1}" if classes else "it takes a seed alone"
        for field in ("prompt", "negative_prompt"):
            if getattr(request, field):  # an empty one asks for nothing; some clients cannot leave it out
                raise Refused(f"{field} is given, but {self.name} is not a text-to-image model: {instead}", field)
        if request.class_label is not None and request.class_label >= classes:
            raise Refused(f"class_label is {request.class_label}; allowed: "
                          + (f"0 to {classes - 1}" if classes else "none, the model has no classes"),
                          "class_label")  # fmt: skip
        if request.size not in (None, "auto", self._size):
            raise Refused(f"size is {request.size}; allowed: {self._size}, or auto", "size")
        names = ("num_inference_steps", "guidance_scale", "sampler")
        given = {name: getattr(request, name) for name in names}
        return Order({"class_label": request.class_label, **given}, self._size)

    def facts(self) -> dict[str, Any]:
        """See ``Served.facts``."""
        sampler, steps = self.pipeline.choose(None, None)
        return {
            "classes": list(self.pipeline.model.info.classes),
            "size": self._size,
            "sizes": [self._size],
            "num_inference_steps": steps,
            "sampler": str(sampler) if isinstance(sampler, str) else "the model's own",
        }

    def picture(self, x: Tensor, preview: bool = False) -> Image.Image:
        """See ``Served.picture``."""
        pictures: list[Image.Image] = self.pipeline.finish(x, "pil")
        return pictures[0]
