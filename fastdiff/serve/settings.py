"""Settings of a server: arguments, or variables of the environment such as ``FASTDIFF_SERVE_PORT``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """How to listen, and how much one request may ask for.

    Raises:
        pydantic.ValidationError: naming each setting outside its range.
    """

    model_config = SettingsConfigDict(env_prefix="FASTDIFF_SERVE_", extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)  # 0: any that is free
    api_key: SecretStr | None = None

    max_batch: int = Field(default=8, ge=2)  # the network's places in one evaluation
    max_queue: Count = 256  # images that may wait
    max_requests: Count = 1024  # requests in flight; each holds a body and a connection
    max_images: Count = 16  # of one request
    max_steps: Count = 200  # of one image
    max_pixels: Count = 2048 * 2048  # of one image
    max_body: Count = 128 * 1024  # bytes of one request
    body_timeout: Seconds = 30.0  # for a body to arrive
    timeout: Seconds = 300.0  # from request to image
    drain: Seconds = 30.0  # for requests in flight when the server is told to stop
