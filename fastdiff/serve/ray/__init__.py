"""Many machines, through Ray: the server as replicas, and offline generation over a table. Needs the extra ``ray``.

No module here imports ray before a function of it is called: what a cluster of one's own listens to is decided by
variables that ray reads when it is imported (see ``cluster``).
"""

from fastdiff.serve.ray.cluster import LOCAL, Scale, cluster
from fastdiff.serve.ray.offline import Offline, draw
from fastdiff.serve.ray.replica import application
from fastdiff.serve.ray.source import Source
from fastdiff.serve.ray.table import Row, read_table

__all__ = ["LOCAL", "Offline", "Row", "Scale", "Source", "application", "cluster", "draw", "read_table"]
