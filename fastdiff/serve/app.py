"""The application: routes, and what hangs together."""

# no postponed annotations: FastAPI reads the body's class, which is made for a server's own limits

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fastdiff.engine import AsyncEngine, Engine
from fastdiff.errors import FastdiffError
from fastdiff.serve.asgi import Guard, Watch, note
from fastdiff.serve.encode import data_url
from fastdiff.serve.errors import GONE, Refused, failure
from fastdiff.serve.jobs import EventStream, Job, Studio, submit, unless_gone
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.models import Served
from fastdiff.serve.page import add_page
from fastdiff.serve.schema import (
    MAX_SEED,
    ErrorResponse,
    ImageRequest,
    ImagesResponse,
    ModelCard,
    ModelList,
    Picture,
    Status,
    limited,
)
from fastdiff.serve.settings import Settings

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "the request does not fit the model or the server's limits",
        401: "no key, or a wrong one",
        404: "no such model",
        408: "the body did not arrive in time",
        413: "the body is too large",
        422: "the image became NaN or infinite with these options",
        503: "busy, or shutting down; Retry-After says when to come again",
    }.items()
}


def create_app(
    engine: Engine, served: Served, settings: Settings | None = None, metrics: Metrics | None = None
) -> FastAPI:
    """An ASGI application in front of an engine, which it closes when it ends.

    Args:
        engine: draws the images.
        served: says what a request becomes.
        settings: limits and key.
        metrics: those that the engine tells its steps; without them there are no times of steps.
    """
    settings, metrics = settings or Settings(), metrics or Metrics()
    metrics.follow(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await AsyncEngine(engine).close(timeout=settings.drain)

    app = FastAPI(
        title="fastdiff",
        version=metadata.version("fastdiff"),
        description="Images from a diffusion UNet. The same seed gives the same image.",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat whatever host the client named
    )
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(Watch, metrics=metrics)  # the outer one
    for kind in (FastdiffError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
    _add_images(app, Studio(AsyncEngine(engine), metrics, served), settings)
    _add_models(app, engine, served, settings)
    _add_operations(app, engine, metrics)
    add_page(app)
    return app


async def _answer(request: Request, error: Exception) -> Response:
    told = failure(error)
    note(request.scope, status=told.status, error=told.message[:300])
    if told.status == GONE:
        return Response(status_code=400)  # nobody reads it
    return told.response()


def _add_images(app: FastAPI, studio: Studio, settings: Settings) -> None:
    Body = limited(settings, studio.served.samplers)

    @app.post(
        "/v1/images/generations", response_model=ImagesResponse, response_model_exclude_none=True, responses=PROBLEMS
    )
    async def generate(body: Body, request: Request) -> Any:  # type: ignore[valid-type]
        """Draw images. With ``stream`` the answer is a stream of server-sent events."""
        asked: ImageRequest = body
        job = await _begin(asked, request, studio, settings)
        if asked.stream:
            return EventStream(studio, job)
        try:
            made = await unless_gone(request, studio.pictures(job))
        finally:
            job.give_up()
            studio.metrics.waited(job.tickets)
        return _whole(job, made, as_url=asked.response_format == "url")


def _whole(job: Job, made: list[str], as_url: bool) -> JSONResponse:
    """All images of a job in one answer."""
    data = [
        Picture(url=data_url(text, job.encoding), seed=seed) if as_url else Picture(b64_json=text, seed=seed)
        for text, seed in zip(made, job.seeds, strict=True)
    ]
    whole = ImagesResponse(created=int(time.time()), data=data, output_format=job.encoding, size=job.size)
    return JSONResponse(whole.model_dump(exclude_none=True))


async def _begin(asked: ImageRequest, request: Request, studio: Studio, settings: Settings) -> Job:
    """Check a request and ask the engine for its images."""
    check(asked, studio.served, settings)
    order, count = await studio.order(asked), asked.n or 1
    first = secrets.randbelow(2**32 - count) if asked.seed is None else asked.seed
    seeds = [first + i for i in range(count)]
    note(request.scope, images=count, size=order.size, seed=first, steps=asked.num_inference_steps,
         sampler=asked.sampler, stream=bool(asked.stream))  # fmt: skip
    tickets = await submit(
        studio.engine, seeds, **order.options, timeout=settings.timeout,
        previews=(asked.partial_images + 1) if asked.partial_images else 0,
    )  # fmt: skip
    return Job(tickets, seeds, order.size, asked.output_format or "png", asked.output_compression)


def check(asked: ImageRequest, served: Served, settings: Settings) -> None:
    """Refuse what no model of this server could serve.

    Raises:
        Refused: naming the field.
    """
    if asked.model not in (None, served.name):
        name = ascii(asked.model)[1:-1][:100]
        raise Refused(f"model {name} is not served here; allowed: {served.name}", "model", 404, "model_not_found")
    if asked.size not in (None, "auto"):
        assert asked.size is not None
        width, height = map(int, asked.size.split("x"))
        if width * height > settings.max_pixels:
            raise Refused(f"size is {asked.size}; allowed: up to {settings.max_pixels} pixels", "size")
    if asked.seed is not None and asked.seed + (asked.n or 1) - 1 > MAX_SEED:
        raise Refused(f"seed is {asked.seed} for {asked.n} images; allowed: seed + n - 1 up to {MAX_SEED}", "seed")
    if asked.partial_images and not asked.stream:
        raise Refused(f"partial_images is {asked.partial_images} without stream; give stream: true", "partial_images")
    if asked.stream and asked.response_format == "url":
        raise Refused("response_format is url with stream; allowed: b64_json", "response_format")
    if asked.output_compression is not None and asked.output_format in (None, "png"):
        raise Refused("output_compression is for jpeg and webp; png loses nothing", "output_compression")


def _add_models(app: FastAPI, engine: Engine, served: Served, settings: Settings) -> None:
    card = ModelCard(
        id=served.name, created=int(time.time()), samplers=list(served.samplers), max_images=settings.max_images,
        max_steps=settings.max_steps, batching="; ".join(engine.promises().values()), **served.facts(),
    )  # fmt: skip

    @app.get("/v1/models", responses={401: PROBLEMS[401]})
    async def models() -> ModelList:
        """What is served."""
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}", responses={401: PROBLEMS[401], 404: PROBLEMS[404]})
    async def model(name: str) -> ModelCard:
        """One model."""
        if name != served.name:
            shown = ascii(name)[1:-1][:100]
            raise Refused(f"model {shown} is not served here; allowed: {served.name}", "model", 404, "model_not_found")
        return card


def _add_operations(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    def status(good: bool, word: str) -> JSONResponse:
        return JSONResponse({"status": word}, 200 if good else 503, None if good else {"retry-after": "5"})

    @app.get("/health", response_model=Status, responses={503: {"model": Status}})
    async def health() -> JSONResponse:
        """Does the engine live? If not, start the server again."""
        alive = engine.alive()
        return status(alive, "ok" if alive else "the engine has stopped")

    @app.get("/ready", response_model=Status, responses={503: {"model": Status}})
    async def ready() -> JSONResponse:
        """Does the server take requests?"""
        accepting = engine.accepting()
        return status(accepting, "ready" if accepting else "closing")

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
