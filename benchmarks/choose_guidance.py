"""Choose the guidance strength of a model on the validation split, which neither training nor the bars ever see.

    python -m fastdiff.benchmarks.choose_guidance --model digits --write

Samples of the network as an ordinary velocity network are judged at each strength. Of those at which 99 % of the images
are recognised as the class asked for, the one with the smallest Frechet distance to the validation split wins; if there
is none, the one that is recognised best. ``--write`` makes it the model's default.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from fastdiff.benchmarks.quality import judge, load_classifier, reference_moments
from fastdiff.benchmarks.table import draw_many, fastdiff_arm
from fastdiff.models.weights import load_model, write_info
from fastdiff.pipeline import Pipeline, resolve

STRENGTHS = (1.0, 1.25, 1.5, 1.75, 2.0)
RECOGNISED = 0.99
OFFSET = 1_000_000  # noise that no reported figure is measured on


def main() -> None:
    """Print one JSON line for each strength."""
    parser = argparse.ArgumentParser(prog="python -m fastdiff.benchmarks.choose_guidance", description=__doc__)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="make the best strength the model's default")
    options = parser.parse_args()
    folder = resolve(options.model)
    pipe, classifier, validation = Pipeline.from_pretrained(folder), load_classifier(), reference_moments("validation")
    judged = {}
    for strength in STRENGTHS:
        arm = fastdiff_arm(pipe, "eager", "ddim", options.steps, strength)
        quality = judge(*draw_many(arm, options.samples, OFFSET), validation, classifier)
        judged[strength] = quality
        print(json.dumps({"guidance_scale": strength, **quality._asdict()}), flush=True)
    clear = [strength for strength, quality in judged.items() if quality.accuracy >= RECOGNISED]
    if clear:
        best = min(clear, key=lambda strength: judged[strength].frechet)
    else:
        best = max(judged, key=lambda strength: judged[strength].accuracy)
    print(json.dumps({"best": best}))
    if options.write:
        write_info(folder, replace(load_model(folder).info, guidance_scale=best))


if __name__ == "__main__":
    main()
