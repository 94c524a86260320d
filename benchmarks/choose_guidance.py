"""Choose the guidance strength of a model on the validation split, which neither training nor the bars ever see.

    python -m fastdiff.benchmarks.choose_guidance --model digits --write

Samples of the network as an ordinary velocity network are compared with the validation split at each strength; the
smallest Frechet distance wins. ``--write`` makes it the model's default.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from fastdiff.benchmarks.quality import judge, load_classifier, reference_moments
from fastdiff.benchmarks.table import draw_many, fastdiff_arm
from fastdiff.models.weights import load_model, write_info
from fastdiff.pipeline import Pipeline, resolve

STRENGTHS = (1.0, 1.25, 1.5, 2.0)


def main() -> None:
    """Print one JSON line for each strength."""
    parser = argparse.ArgumentParser(prog="python -m fastdiff.benchmarks.choose_guidance", description=__doc__)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--write", action="store_true", help="make the best strength the model's default")
    options = parser.parse_args()
    folder = resolve(options.model)
    pipe, classifier, validation = Pipeline.from_pretrained(folder), load_classifier(), reference_moments("validation")
    distances = {}
    for strength in STRENGTHS:
        arm = fastdiff_arm(pipe, "eager", "ddim", options.steps, strength)
        quality = judge(*draw_many(arm, options.samples), validation, classifier)
        distances[strength] = quality.frechet
        print(json.dumps({"guidance_scale": strength, **quality._asdict()}), flush=True)
    best = min(distances, key=distances.__getitem__)
    print(json.dumps({"best": best}))
    if options.write:
        write_info(folder, replace(load_model(folder).info, guidance_scale=best))


if __name__ == "__main__":
    main()
