"""Predicted times put options in the order in which they run."""

from __future__ import annotations

import pytest

from onnx_bitnet.planning.frontier import Option, frontier
from onnx_bitnet.planning.speed import relative_time
from onnx_bitnet.quantization.spec import LayerSpec


def test_passes_blocks_and_activations_take_time():
    fast = LayerSpec(integer_bits=4, granularity="channel", activation_bits=8)
    times = [
        relative_time(spec, 512, 512)
        for spec in (
            fast,
            LayerSpec(integer_bits=4, granularity="block:128", activation_bits=8),
            LayerSpec(integer_bits=4, granularity="block:32", activation_bits=8),
            LayerSpec(planes=3, granularity="block:32", activation_bits=8),
        )
    ]
    assert times == sorted(set(times))
    assert (
        relative_time(LayerSpec(integer_bits=4, granularity="channel", activation_bits=16), 512, 512)
        > times[0]
    )
    assert (
        relative_time(LayerSpec(planes=2, levels=9, granularity="channel", activation_bits=8), 512, 512)
        == times[0]
    )
    assert relative_time(LayerSpec(activation_bits=32), 512, 512) == 1


def test_of_two_that_are_as_exact_and_nearly_as_large_the_faster_wins():
    slow, fast = Option("slow", 1000, 1.0, 4000.0), Option("fast", 1010, 1.0, 1000.0)
    worst, best = Option("worst", 500, 3.0, 1000.0), Option("best", 9000, 0.0, 1000.0)
    chosen = {point.options[0] for point in frontier([[worst, slow, fast, best]])}
    assert chosen == {0, 2, 3}


def test_a_rotation_takes_time_that_its_readers_share():
    plain = LayerSpec(integer_bits=4, granularity="channel", activation_bits=8)
    turned = LayerSpec(integer_bits=4, granularity="channel", activation_bits=8, rotation=128)
    alone, three = (relative_time(turned, 512, outputs) for outputs in (512, 1536))
    without = relative_time(plain, 512, 512)
    assert without < three < alone
    assert 3 * (three - without) == pytest.approx(alone - without)
