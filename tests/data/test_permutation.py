"""The order is a permutation for every size, seed and epoch, and looks shuffled."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa.data.permutation import permute, shuffled


def order(size, seed=0, epoch=0):
    return permute(np.arange(size), size=size, seed=seed, epoch=epoch)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 10**9))
def test_every_index_once(size, seed, epoch):
    assert np.array_equal(np.sort(order(size, seed, epoch)), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500), st.data())
def test_points_alone_equal_points_together(size, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=9)))
    assert np.array_equal(permute(index, size=size, seed=5, epoch=2), order(size, 5, 2)[index])


def test_seeds_and_epochs_give_orders_of_their_own():
    orders = [tuple(order(500, seed, epoch)) for seed in range(8) for epoch in range(8)]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_no_place_prefers_an_index(size):
    # Where index 0 lands over many epochs: chi-squared against uniform, 7 standard deviations.
    epochs = 100 * size if size < 1000 else 10 * size
    landed = np.concatenate(
        [permute(np.array([0]), size=size, seed=1, epoch=epoch) for epoch in range(epochs)]
    )
    counts = np.bincount(landed, minlength=size)
    chi_squared = ((counts - epochs / size) ** 2).sum() / (epochs / size)
    assert abs(chi_squared - (size - 1)) < 7 * np.sqrt(2 * size)


def test_neighbours_do_not_stay_neighbours():
    # A uniform shuffle keeps 2 adjacent pairs on average, whatever its size.
    kept = [(np.abs(np.diff(order(5000, seed))) == 1).sum() for seed in range(20)]
    assert 0.8 < np.mean(kept) < 3.2


def test_order_is_fixed_for_ever():
    # A checkpoint made by one version resumes in the next only while these stand.
    assert order(10, seed=0, epoch=0).tolist() == [3, 7, 8, 9, 5, 0, 1, 6, 2, 4]
    assert permute(np.array([0, 1, 2]), size=10**12, seed=7, epoch=3).tolist() == [
        226482837684,
        863094921416,
        619019658665,
    ]


@pytest.mark.parametrize("size", [1, 7, 1024, 2500])
def test_what_stands_from_a_position_on_is_the_order_of_its_epochs(size):
    epochs = np.concatenate([order(size, 3, epoch) for epoch in range(-(-6000 // size))])
    for position, count in [(0, 1), (1020, 9), (2490, 40), (700, 3000), (4999, 0)]:
        found = shuffled(position, count, size=size, seed=3)
        assert np.array_equal(found, epochs[position : position + count])
