"""Which implementation of attention is used where, as data. Whoever measures adds rows; nothing here is a guess.

A row: (compute capability times ten, shape class, "half" or "float") -> (who, the figures that say so). What has no
row is torch's ``scaled_dot_product_attention``, which chooses among its own backends.

There is no row yet: our kernel has been proven in Triton's interpreter and compiled for every chip, but not timed. Rows
come from ``python -m fastdiff.benchmarks.gpu_suite --out DIR --only kernels_speed``; our kernel gets one only where it
was the fastest of all backends in that run.
"""

from __future__ import annotations

Table = dict[tuple[int, str, str], tuple[str, str]]

ATTENTION: Table = {}
