"""What the commands share."""

from __future__ import annotations

import argparse
import json
from typing import Any


def show(options: argparse.Namespace, report: dict[str, Any], text: str) -> None:
    """Print a report, as JSON if that was asked for."""
    print(json.dumps(report) if options.json else text, flush=True)
