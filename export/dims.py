"""Sizes that are known only when a graph runs: whole numbers such as ``2*batch`` or ``(height + -1)//2 + 1``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Dim:
    """A sum of whole multiples of names, plus a number; products and quotients of names are names of their own.

    Equal sums are equal objects, which is all the arithmetic that shapes need.
    """

    terms: tuple[tuple[str, int], ...]  # sorted by name, no multiple is 0
    rest: int = 0

    @staticmethod
    def of(name: str) -> Dim:
        """The dimension with this name."""
        return Dim(((name, 1),))

    def __str__(self) -> str:
        parts = [name if times == 1 else f"{times}*{name}" for name, times in self.terms]
        return " + ".join(parts + ([str(self.rest)] if self.rest else []))

    def _whole(self) -> str:
        """As a factor: in brackets if it is a sum."""
        return str(self) if len(self.terms) == 1 and not self.rest else f"({self})"

    def factors(self) -> tuple[int, list[str]]:
        """A number and names whose product it is."""
        if len(self.terms) != 1 or self.rest:
            return 1, [self._whole()]
        name, times = self.terms[0]
        return times, [name] if "(" in name else name.split("*")

    def __add__(self, other: Size) -> Size:
        terms, rest = dict(self.terms), self.rest
        if isinstance(other, Dim):
            for name, times in other.terms:
                terms[name] = terms.get(name, 0) + times
            rest += other.rest
        else:
            rest += other
        return _made(terms, rest)

    def __sub__(self, other: Size) -> Size:
        return self + other * -1

    def __mul__(self, other: Size) -> Size:
        if isinstance(other, int):
            return _made({name: times * other for name, times in self.terms}, self.rest * other)
        (times, names), (more, others) = self.factors(), other.factors()
        return Dim((("*".join(sorted(names + others)), times * more),))

    def __floordiv__(self, other: int) -> Size:
        if all(times % other == 0 for _, times in self.terms):
            return _made({name: times // other for name, times in self.terms}, self.rest // other)
        return Dim.of(f"{self._whole()}//{other}")

    def __mod__(self, other: int) -> Size:
        return (
            0
            if all(times % other == 0 for _, times in self.terms) and self.rest % other == 0
            else Dim.of(f"{self._whole()}%{other}")
        )

    def __lt__(self, other: int) -> bool:
        return other > 1  # a size is at least 1, and nothing else is known of it

    __radd__, __rmul__ = __add__, __mul__


Size = int | Dim
Shape = tuple[Size, ...]


def _made(terms: dict[str, int], rest: int) -> Size:
    kept = tuple(sorted((name, times) for name, times in terms.items() if times))
    return Dim(kept, rest) if kept else rest


def product(sizes: Iterable[Size]) -> Size:
    """Their product; 1 for none."""
    total: Size = 1
    for size in sizes:
        total = size * total
    return total


def quotient(sizes: Iterable[Size], divisors: Iterable[Size]) -> Size | None:
    """The product of some sizes over that of others; None if it is not known to be whole."""
    number, names = _taken_apart(sizes)
    below, others = _taken_apart(divisors)
    for name in others:
        if name not in names:
            return None
        names.remove(name)
    if below == 0 or number % below:
        return None
    return Dim((("*".join(sorted(names)), number // below),)) if names else number // below


def _taken_apart(sizes: Iterable[Size]) -> tuple[int, list[str]]:
    number, names = 1, list[str]()
    for size in sizes:
        times, more = size.factors() if isinstance(size, Dim) else (size, [])
        number, names = number * times, names + more
    return number, names
