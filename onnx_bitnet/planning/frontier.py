"""The best trade of size and time against error: one option for each layer, chosen by marginal returns.

What an option costs is its bytes, and a little for the time that it takes: of two that are as exact and
nearly as large the faster one wins. The problem is a multiple-choice knapsack. Lagrange multipliers solve its
relaxation exactly: of each layer's options only those on the lower convex hull of (price, loss) matter, and
taking all steps between neighbours on the hulls, from the most loss saved for its price to the least, gives
every point of the convex frontier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# What the time of a product in float is worth in bytes: 10 % of its weight. On MiniLM at a cosine of 0.99 the
# plan is a third faster for it, and 1 % larger.
_WORTH = 0.4


def _price(nbytes: int, time: float) -> float:
    return nbytes + _WORTH * time


@dataclass(frozen=True)
class Option:
    """One way to store a layer, or several layers that share a weight.

    Args:
        name: what the option is called.
        nbytes: bytes of its tensors.
        loss: what it adds to the loss of the model; losses of layers are summed.
        time: what a row takes, in products of float.
    """

    name: str
    nbytes: int
    loss: float
    time: float = 0.0

    @property
    def price(self) -> float:
        """What it costs, in bytes."""
        return _price(self.nbytes, self.time)


@dataclass(frozen=True)
class Point:
    """A choice of one option for each layer.

    Args:
        options: index of the option of each layer.
        nbytes: sum of their bytes.
        loss: sum of their losses.
        time: sum of their times.
    """

    options: tuple[int, ...]
    nbytes: int
    loss: float
    time: float

    @property
    def price(self) -> float:
        """What it costs, in bytes."""
        return _price(self.nbytes, self.time)


def hull(options: Sequence[Option]) -> list[int]:
    """Return the indices of the options on the lower convex hull, from the cheapest to the most exact.

    >>> hull([Option("a", 1, 9.0), Option("b", 2, 8.0), Option("c", 3, 1.0), Option("d", 4, 2.0)])
    [0, 2]
    """
    best: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i].price, options[i].loss)):
        option = options[index]
        if best and option.loss >= options[best[-1]].loss:
            continue
        while len(best) > 1 and _saving(options[best[-2]], options[best[-1]]) <= _saving(
            options[best[-1]], option
        ):
            best.pop()
        best.append(index)
    return best


def _saving(smaller: Option, larger: Option) -> float:
    """Loss saved for each byte of the price."""
    return (smaller.loss - larger.loss) / max(larger.price - smaller.price, 1)


def frontier(layers: Sequence[Sequence[Option]]) -> list[Point]:
    """Return the points of the convex frontier, from the cheapest to the most exact.

    >>> layers = [[Option("a", 1, 9.0), Option("b", 3, 1.0)], [Option("c", 5, 0.0)]]
    >>> [point.nbytes for point in frontier(layers)]
    [6, 8]
    """
    hulls = [hull(options) for options in layers]
    steps = sorted(
        (
            (-_saving(options[here], options[there]), layer, position)
            for layer, (options, indices) in enumerate(zip(layers, hulls, strict=True))
            for position, (here, there) in enumerate(pairwise(indices))
        )
    )
    chosen = [indices[0] for indices in hulls]
    points = [_point(layers, chosen)]
    for _, layer, position in steps:
        chosen[layer] = hulls[layer][position + 1]
        points.append(_point(layers, chosen))
    return points


def _point(layers: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Point:
    taken = [options[index] for options, index in zip(layers, chosen, strict=True)]
    return Point(
        tuple(chosen),
        sum(option.nbytes for option in taken),
        sum(option.loss for option in taken),
        sum(option.time for option in taken),
    )


def uniform(layers: Sequence[Sequence[Option]]) -> list[Point]:
    """Return the choices of one option, by name, for all layers, from the dearest to the cheapest.

    None is there that a cheaper one is as exact as.

    >>> layers = [[Option("a", 1, 9.0), Option("b", 3, 1.0)], [Option("b", 5, 0.0)]]
    >>> [point.options for point in uniform(layers)]
    [(1, 0)]
    """
    places = [{option.name: index for index, option in enumerate(options)} for options in layers]
    names = [name for name in (places[0] if places else ()) if all(name in known for known in places)]
    found: list[Point] = []
    for point in sorted((_point(layers, [known[name] for known in places]) for name in names), key=_first):
        if not found or point.loss < found[-1].loss:
            found.append(point)
    return found[::-1]


def _first(point: Point) -> tuple[float, float]:
    return point.price, point.loss


def within(layers: Sequence[Sequence[Option]], budget: int) -> Point | None:
    """Return the best choice of at most `budget` bytes: a point of the frontier, and what else still fits.

    None if even the smallest choice is larger. It is worse than the optimum by one step of one layer at most.
    """
    fitting = [point for point in frontier(layers) if point.nbytes <= budget]
    if not fitting:
        return None
    chosen = list(fitting[-1].options)
    left = budget - fitting[-1].nbytes
    while True:
        better = [
            (_saving(options[here], option), layer, index, option.nbytes - options[here].nbytes)
            for layer, (options, here) in enumerate(zip(layers, chosen, strict=True))
            for index, option in enumerate(options)
            if option.loss < options[here].loss and option.nbytes - options[here].nbytes <= left
        ]
        if not better:
            return _point(layers, chosen)
        _, layer, index, more = max(better)
        chosen[layer] = index
        left -= more
