"""``python -m fastdiff.benchmarks.stub_server``: ``fastdiff serve`` with a stub for a network."""

from __future__ import annotations

import sys
from unittest.mock import patch

from fastdiff.benchmarks.stub import stub_pipeline
from fastdiff.cli import main
from fastdiff.pipeline import Pipeline

if __name__ == "__main__":
    pipe, _ = stub_pipeline()
    with patch.object(Pipeline, "from_pretrained", lambda *_, **__: pipe):
        sys.exit(main(["serve", *sys.argv[1:]]))
