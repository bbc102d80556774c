"""What layers are weighed by: close to the weight, with the means of its outputs."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_bitnet.calibration.activations import Collector
from onnx_bitnet.planning.probe import Probe, noise_to_signal


@pytest.mark.parametrize("k", [128, 40])
def test_four_bits_keep_the_means_of_outputs(k):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((500, k)) * np.exp(rng.standard_normal(k)) + 1).astype(np.float32)
    weight = rng.standard_normal((24, k), np.float32)
    collector = Collector(k, second_moment=True)
    collector.add(x)
    statistics = collector.result()
    decoded = Probe.of("layer", weight, statistics).decoded(weight)
    np.testing.assert_allclose((x @ decoded.T).mean(axis=0), (x @ weight.T).mean(axis=0), atol=1e-3)
    noise = noise_to_signal(decoded - weight, weight, statistics)
    y = x @ weight.T
    assert noise == pytest.approx(np.square(x @ decoded.T - y).sum() / np.square(y).sum(), rel=1e-2)
    assert 1e-5 < noise < 0.02


def test_a_constant_shift_is_no_noise():
    """The bias takes it away."""
    x = np.random.default_rng(1).standard_normal((400, 32), np.float32)
    x[:, 0] = 3
    collector = Collector(32, second_moment=True)
    collector.add(x)
    off = np.zeros((4, 32), np.float32)
    off[:, 0] = 0.5
    assert noise_to_signal(off, np.ones((4, 32), np.float32), collector.result()) < 1e-6
