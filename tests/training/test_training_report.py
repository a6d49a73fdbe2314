import pytest

from gsa.training.report import smoothed


def test_smoothing_keeps_order_and_level_and_removes_noise():
    line = [float(i) for i in range(101)]
    assert smoothed(line, 0.0) == line
    noisy = [value + (-1) ** i * 5 for i, value in enumerate(line)]
    result = smoothed(noisy, 0.8)
    assert result[30:70] == pytest.approx(line[30:70], abs=0.2)
    assert smoothed([3.0] * 7, 0.9) == pytest.approx([3.0] * 7)
