"""``python -m fastdiff.cli``."""

from __future__ import annotations

import sys

from fastdiff.cli import main

sys.exit(main())
