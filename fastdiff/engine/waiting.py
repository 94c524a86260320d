"""Who gets the next place: first come, first served within a priority, and no bucket waits for another."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar


class Waiter(Protocol):
    """What a queue has to know of an item."""

    @property
    def rank(self) -> tuple[int, int]:
        """Less is served first."""


Item = TypeVar("Item", bound=Waiter)


class _Entry(NamedTuple):
    rank: tuple[int, int]
    item: object

    def __lt__(self, other: tuple) -> bool:  # type: ignore[override]
        return self.rank < other[0]


class Waiting(Generic[Item]):
    """Queues by bucket, bounded together. Not safe for threads: its owner holds a lock.

    Args:
        limit: items in all buckets together.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._heaps: dict[Hashable, list[_Entry]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def full(self) -> bool:
        """Is there no room?"""
        return self._count >= self.limit

    def push(self, bucket: Hashable, item: Item) -> None:
        """Queue an item, also beyond the limit: who was admitted once (a paused image) is not turned away."""
        heapq.heappush(self._heaps.setdefault(bucket, []), _Entry(item.rank, item))
        self._count += 1

    def pop(self, bucket: Hashable) -> Item | None:
        """The next item of a bucket."""
        heap = self._heaps.get(bucket)
        if not heap:
            return None
        item = heapq.heappop(heap).item
        self._count -= 1
        if not heap:
            del self._heaps[bucket]
        return item  # type: ignore[return-value]

    def buckets(self) -> list[Hashable]:
        """Those that somebody waits in."""
        return list(self._heaps)

    def items(self) -> Iterator[Item]:
        """All items, in no order."""
        for heap in self._heaps.values():
            for entry in heap:
                yield entry.item  # type: ignore[misc]

    def remove(self, wanted: object) -> Iterator[Item]:
        """Take out and yield every item for which ``wanted(item)`` holds."""
        for bucket, heap in list(self._heaps.items()):
            out = [entry for entry in heap if wanted(entry.item)]  # type: ignore[operator]
            if not out:
                continue
            kept = [entry for entry in heap if not any(entry is gone for gone in out)]
            heapq.heapify(kept)
            self._count -= len(out)
            if kept:
                self._heaps[bucket] = kept
            else:
                del self._heaps[bucket]
            for entry in out:
                yield entry.item  # type: ignore[misc]
