"""Which of several points are worth a choice: those that nothing beats throughout."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Point = TypeVar("Point")


def front(
    points: Sequence[Point],
    costs: Callable[[Point], tuple[float, ...]],
    *,
    slack: float = 0.0,
) -> list[Point]:
    """The points that no other dominates, in the order given.

    One point dominates another if it is at most as high in every cost and lower in at
    least one; of points equal in all costs the first stays.

    Args:
        points: anything.
        costs: the costs of a point; less is better, none is negative.
        slack: the fraction by which "lower" must be lower, so that points which an
            inexact cost cannot tell apart all stay.
    """
    values = [costs(point) for point in points]

    def dominates(one: int, other: int) -> bool:
        pairs = list(zip(values[one], values[other], strict=True))
        if values[one] == values[other]:
            return one < other
        return all(a <= b for a, b in pairs) and any(
            a < b * (1 - slack) for a, b in pairs
        )

    return [
        point
        for index, point in enumerate(points)
        if not any(dominates(other, index) for other in range(len(points)))
    ]
