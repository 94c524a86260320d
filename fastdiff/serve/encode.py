"""Pictures as bytes, and as text for JSON."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from fastdiff.serve.schema import Encoding

QUALITY = 90  # of jpeg and webp, where the client says nothing


def encode(picture: Image.Image, encoding: Encoding, quality: int | None) -> str:
    """A picture in base64."""
    options: dict[str, Any] = {} if encoding == "png" else {"quality": QUALITY if quality is None else quality}
    stream = io.BytesIO()
    picture.save(stream, format=encoding, **options)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def data_url(text: str, encoding: Encoding) -> str:
    """The same as a URL that needs no server."""
    return f"data:image/{encoding};base64,{text}"
