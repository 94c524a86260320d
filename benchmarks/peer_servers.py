"""What people serve diffusion models with today, for ``bench_engine`` to stand beside: diffusers behind FastAPI.

``lock``: a request at a time, the others wait. ``batching``: requests of one step count that wait together run
together, from their first step to their last. Both answer ``POST /v1/images/generations`` as ``fastdiff serve`` does.
"""

# no postponed annotations: FastAPI reads the body's class

import argparse
import base64
import io
import queue
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import torch
import uvicorn
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from fastapi import FastAPI
from pydantic import BaseModel

from fastdiff.images import to_images
from fastdiff.models.weights import load_model
from fastdiff.pipeline import resolve

MOST = 8  # images of one batch, as many as the engine takes


class Asked(BaseModel):
    """A request."""

    class_label: int
    num_inference_steps: int
    seed: int


class Drawing:
    """The bundled model in diffusers, with its own guidance."""

    def __init__(self) -> None:
        model = load_model(resolve("digits"))
        self.unet = UNet2DModel.from_pretrained(resolve("digits"), low_cpu_mem_usage=False).eval()
        self.info = model.info
        self.shape = (1, model.network.config.sample_size, model.network.config.sample_size)

    @torch.no_grad()
    def __call__(self, asked: Sequence[Asked]) -> list[str]:
        """Draw images of one step count: PNGs in base64."""
        scheduler = FlowMatchEulerDiscreteScheduler()  # it keeps state: one for each batch
        scheduler.set_timesteps(asked[0].num_inference_steps)
        noise = [torch.randn(self.shape, generator=torch.Generator().manual_seed(one.seed)) for one in asked]
        x, labels = torch.stack(noise), torch.tensor([one.class_label for one in asked])
        both = torch.cat([labels, torch.full_like(labels, self.info.null_label or 0)])
        for t in scheduler.timesteps:
            strong, weak = self.unet(torch.cat([x, x]), t, class_labels=both).sample.chunk(2)
            x = scheduler.step(weak + self.info.guidance_scale * (strong - weak), t, x).prev_sample
        texts = []
        for image in to_images(x.clamp(-1, 1), self.info.crop, "pil"):
            file = io.BytesIO()
            image.save(file, "PNG")
            texts.append(base64.b64encode(file.getvalue()).decode())
        return texts


class Serving(Protocol):
    """One way to serve."""

    def __call__(self, asked: Asked) -> str:
        """Draw one image: a PNG in base64. Called by many threads."""


class Lock:
    """One request at a time."""

    def __init__(self, drawing: Drawing):
        self.drawing, self.lock = drawing, threading.Lock()

    def __call__(self, asked: Asked) -> str:
        """See ``Serving``."""
        with self.lock:
            return self.drawing([asked])[0]


class Waiting(NamedTuple):
    """A request in the queue."""

    asked: Asked
    answer: Future[str]


class Batching:
    """Requests of one step count that wait together, as one batch from start to end."""

    def __init__(self, drawing: Drawing):
        self.drawing, self.arrivals = drawing, queue.SimpleQueue[Waiting]()
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, asked: Asked) -> str:
        """See ``Serving``."""
        waiting = Waiting(asked, Future())
        self.arrivals.put(waiting)
        return waiting.answer.result()

    def _work(self) -> None:
        held: list[Waiting] = []
        while True:
            if not held:
                held.append(self.arrivals.get())
            while not self.arrivals.empty():
                held.append(self.arrivals.get())
            steps = held[0].asked.num_inference_steps
            batch = [one for one in held if one.asked.num_inference_steps == steps][:MOST]
            held = [one for one in held if not any(one is taken for taken in batch)]
            for one, text in zip(batch, self.drawing([one.asked for one in batch]), strict=True):
                one.answer.set_result(text)


KINDS: dict[str, Any] = {"lock": Lock, "batching": Batching}


def create_app(serving: Serving) -> FastAPI:
    """The usual application."""
    app = FastAPI()

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/images/generations")
    def generate(asked: Asked) -> dict[str, Any]:  # in a thread of FastAPI's pool
        return {"data": [{"b64_json": serving(asked)}]}

    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fastdiff.benchmarks.peer_servers --kind lock --port 8001``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=list(KINDS), required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args(arguments)
    app = create_app(KINDS[options.kind](Drawing()))
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
