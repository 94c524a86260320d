"""What clients send and get: the field names of the images API, and a few of our own."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, create_model

from fastdiff.serve.settings import Settings

MAX_SEED = 2**63 - 1
MAX_PROMPT = 32_000  # characters, as the API has it
Encoding = Literal["png", "jpeg", "webp"]
NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}  # clients in typed languages insist on the field


class ImageRequest(BaseModel):
    """What to draw. A field that is null counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    prompt: str | None = Field(None, max_length=MAX_PROMPT, description="what to show, for text-to-image models")
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT, description="what not to show")
    class_label: int | None = Field(None, ge=0, lt=2**31, description="what to draw, for class-conditional models")
    model: str | None = Field(None, max_length=256, description="the served model's name, or nothing")
    n: int | None = Field(None, ge=1, description="number of images (1); image i has seed + i")
    size: str | None = Field(None, pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="WIDTHxHEIGHT")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="url: a data URL")
    output_format: Encoding | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="drawn at random, and told, where absent")
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=100, description="1: no guidance")
    sampler: str | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=10, description="previews of each image, with stream")
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: str | None = Field(None, max_length=512, description="not used")


def limited(settings: Settings, samplers: tuple[str, ...]) -> type[ImageRequest]:
    """``ImageRequest`` with a server's own limits, so that its OpenAPI document tells them."""
    whole: Any = int | None
    return create_model(
        "ImageRequest",
        __base__=ImageRequest,
        __doc__=ImageRequest.__doc__,
        n=(whole, Field(None, ge=1, le=settings.max_images, description="number of images (1); image i has seed + i")),
        num_inference_steps=(whole, Field(None, ge=1, le=settings.max_steps)),
        sampler=(Literal[samplers] | None, None),
    )


class Picture(BaseModel):
    """One image: in base64 or as a data URL."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImagesResponse(BaseModel):
    """All images of a request."""

    created: int
    background: Literal["opaque"] = "opaque"
    data: list[Picture]
    output_format: Encoding
    size: str
    usage: dict[str, Any] = NO_TOKENS


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Every answer that is not a success."""

    error: Problem


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fastdiff"
    classes: list[str]
    prompts: bool = False  # does it draw what a prompt says?
    size: str
    sizes: list[str]
    num_inference_steps: int
    sampler: str
    samplers: list[str]
    max_images: int
    max_steps: int
    batching: str


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(BaseModel):
    """Of the server."""

    status: str


class Order(NamedTuple):
    """A request that a model takes, made ready for an engine."""

    options: dict[str, Any]  # of ``Engine.submit``, all but the seed
    size: str  # WIDTHxHEIGHT
