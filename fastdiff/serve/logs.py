"""Logs for programs: one JSON object a line, on stderr."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, TextIO


class JsonFormatter(logging.Formatter):
    """A record as JSON; what it carries as ``facts`` becomes fields."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)  # ASCII: a request can put no line break and no control character into the log


def log_to(stream: TextIO | None, level: str) -> None:
    """Write logs to a stream: our own lines from ``level`` on, those of others from warnings on.

    Args:
        stream: None for ``sys.stderr``.
        level: a name that ``logging`` knows, in any case.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]  # not through dictConfig, which closes every handler of the process: Ray uses its own on
    root.setLevel(logging.WARNING)
    logging.getLogger("fastdiff").setLevel(level.upper())
