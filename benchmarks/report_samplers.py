"""From ``benchmarks/results/samplers.json`` to the generated tables of docs/SAMPLERS.md."""

from __future__ import annotations

from typing import Any

LIBRARIES = ("fastdiff", "diffusers", "k-diffusion")


def accuracy_table(results: dict[str, Any]) -> str:
    """Least error of each library at each number of network calls, and by what."""
    lines = ["| problem | calls | fastdiff | diffusers | k-diffusion |", "| --- | ---: | --- | --- | --- |"]
    for problem, found in results["accuracy"].items():
        for budget in sorted({score["budget"] for score in found["scores"]}):
            cells = []
            for library in LIBRARIES:
                own = [s for s in found["scores"] if s["library"] == library and s["budget"] == budget]
                top = min(own, key=lambda score: float(score["error"]), default=None)
                cells.append(f"{float(top['error']):.2g}: {top['label']}" if top else "")
            lines.append(f"| {problem} | {budget} | {' | '.join(cells)} |")
    machine = results["environment"]
    versions = machine["versions"]
    lines += [
        "",
        f"Root mean square error relative to the solution; diffusers {versions['diffusers']}, {machine['date']}.",
    ]
    return "\n".join(lines)


def order_table(results: dict[str, Any]) -> str:
    """Declared and measured orders of every solver with its default options."""
    rows: dict[str, dict[str, float]] = {}
    for record in results["orders"]:
        name, _, options = record["solver"].partition("(")
        if options and set(options.rstrip(")").replace(" ", "").split(",")) - FREE:
            continue  # options beside those that only leave the noise out
        row = rows.setdefault(name, {"declared": record["declared"]})
        order = float(record["order"])
        row[record["start"]] = min(order, row.get(record["start"], order))
    lines = ["| sampler | declared | measured, exact start | with its usual start |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| `{name}` | {row['declared']} | {row['exact']:.2f} | {row['usual']:.2f} |"
        for name, row in sorted(rows.items())
    ]
    return "\n".join(lines)


FREE = {"eta=0.0", "tau=0.0", "churn=0.0"}


def cost_table(results: dict[str, Any]) -> str:
    """What a step costs the host beyond torch's own calls."""
    lines = ["| sampler | fastdiff, microseconds | diffusers, microseconds |", "| --- | ---: | ---: |"]
    lines += [
        f"| `{cost['sampler']}` | {cost['ours']:.1f} | {cost['diffusers']:.0f} |" for cost in results["host cost"]
    ]
    return "\n".join(lines)


PARTS = {"accuracy": accuracy_table, "orders": order_table, "host cost": cost_table}
