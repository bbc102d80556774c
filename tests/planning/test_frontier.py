"""The solver against exhaustive search, and what its frontier looks like."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnx_bitnet.planning.frontier import Option, frontier, hull, uniform, within


def layers(seed: int, count: int = 4, options: int = 4) -> list[list[Option]]:
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        sizes = np.sort(generator.integers(1, 100, options))
        losses = np.sort(generator.exponential(size=options))[::-1]
        found.append(
            [
                Option(str(i), int(size), float(loss))
                for i, (size, loss) in enumerate(zip(sizes, losses, strict=True))
            ]
        )
    return found


def best(problem: list[list[Option]], budget: int) -> float | None:
    """The least loss within a budget, by trying everything."""
    choices = [choice for choice in itertools.product(*problem) if sum(o.nbytes for o in choice) <= budget]
    return min((sum(option.loss for option in choice) for choice in choices), default=None)


@pytest.mark.parametrize("seed", range(20))
def test_points_of_the_frontier_are_optimal_for_their_size(seed):
    problem = layers(seed)
    points = frontier(problem)
    assert [point.nbytes for point in points] == sorted(point.nbytes for point in points)
    for point in points:
        assert point.loss == pytest.approx(best(problem, point.nbytes))
        taken = [options[index] for options, index in zip(problem, point.options, strict=True)]
        assert (point.nbytes, point.loss) == (
            sum(option.nbytes for option in taken),
            sum(option.loss for option in taken),
        )


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_is_kept_and_nearly_used_up(seed):
    problem = layers(seed)
    steps = [
        options[a].loss - options[b].loss for options in problem for a, b in itertools.pairwise(hull(options))
    ]
    for budget in (0, 120, 200, 300, 1000):
        point, least = within(problem, budget), best(problem, budget)
        assert (point is None) == (least is None)
        if point is not None and least is not None:
            assert point.nbytes <= budget
            assert least - 1e-12 <= point.loss <= least + max(steps)


def test_options_that_are_larger_and_worse_are_never_taken():
    assert hull([Option("a", 5, 1.0), Option("b", 5, 2.0), Option("c", 9, 1.0), Option("d", 4, 3.0)]) == [
        3,
        0,
    ]


def test_a_uniform_choice_is_one_that_all_layers_have():
    first = [Option("a", 1, 3.0, 5.0), Option("b", 2, 1.0, 7.0), Option("float", 9, 0.0, 9.0)]
    second = [Option("b", 4, 2.0, 1.0), Option("float", 8, 0.0, 2.0)]
    found = uniform([first, second])
    assert [(point.options, point.nbytes, point.loss, point.time) for point in found] == [
        ((2, 1), 17, 0.0, 11.0),
        ((1, 0), 6, 3.0, 8.0),
    ]
    assert uniform([]) == []


def test_uniform_choices_become_cheaper_and_less_exact():
    """A choice that a cheaper one makes needless would end the search if it missed a goal."""
    layer = [Option("a", 1, 9.0), Option("b", 3, 4.0), Option("c", 2, 2.0), Option("d", 5, 1.0)]
    points = uniform([layer, layer])
    assert [layer[point.options[0]].name for point in points] == ["d", "c", "a"]
