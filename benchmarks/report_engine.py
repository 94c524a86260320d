"""The table of docs/SERVING.md, from the committed results of check-engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def load(results: dict[str, Any]) -> str:
    """Every server's figures under the same requests."""
    lines = [
        "| server | answers, p50 | p99 | one after the other, p90 | all at once | requests |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in results["load"]["servers"].items():
        lines.append(
            f"| {name} | {row['p50_ms']:.0f} ms | {row['p99_ms']:.0f} ms | {row['single_stream_p90_ms']:.0f} ms "
            f"| {row['images_per_s']:.1f} images/s | {row['requests']} |"
        )
    facts = results["environment"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "diffusers"))
    rate, where = results["load"]["requests_per_s"], f"{facts['cpu']}, {facts['threads']} threads, {versions}"
    return "\n".join(
        [
            *lines,
            "",
            f"Poisson arrivals of {rate:.2f} requests a second; {where}; `{results['command']}`, {facts['date']}.",
        ]
    )


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {"load": load}
