"""Draws follow the probabilities and depend on nothing but seed, position and word."""

import pytest
import torch

from gsa.generation import Sampling
from gsa.generation.sampling import Choices, Needs, cut, gumbel, sample, word_keys


def choices(samplings, words):
    made = Choices(len(samplings), words, torch.device("cpu"))
    for row, sampling in enumerate(samplings):
        made.put(row, sampling)
    return made


def shares(probs, rows=4000, **options):
    """How often each token comes, over seeds."""
    sampling = Sampling(**options)
    made = choices([sampling], len(probs))
    for name, tensor in vars(made).items():
        if len(tensor) == 1:  # a row's
            setattr(made, name, tensor.expand(rows, *tensor.shape[1:]))
    made.seed = torch.arange(rows)
    logits = torch.tensor(probs).log().expand(rows, -1)
    drawn = sample(logits, made, torch.zeros(rows, dtype=torch.int64), sampling.needs)
    return (drawn.bincount(minlength=len(probs)) / rows).tolist()


def test_sampling_follows_the_probabilities():
    assert shares([0.5, 0.3, 0.2]) == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    assert shares([0.5, 0.3, 0.2], temperature=0.5) == pytest.approx(
        [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38], abs=0.03
    )


def test_top_k_and_top_p_cut_the_tail():
    probs = [0.2, 0.5, 0.3]
    assert shares(probs, top_k=2) == pytest.approx([0.0, 0.625, 0.375], abs=0.03)
    assert shares(probs, top_p=0.6) == pytest.approx([0.0, 0.625, 0.375], abs=0.03)
    assert shares(probs, top_p=0.4, rows=50) == [0.0, 1.0, 0.0]
    assert shares(probs, top_k=1, rows=50) == [0.0, 1.0, 0.0]
    # of the two that top_k leaves, the first alone reaches 0.6
    assert shares(probs, top_k=2, top_p=0.6, rows=50) == [0.0, 1.0, 0.0]


def test_cuts_are_those_of_transformers():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 3
    for k, p in ((0, 0.9), (7, 1.0), (40, 0.6), (0, 1.0), (400, 1.0)):
        expected = logits
        if k:
            expected = TopKLogitsWarper(k)(None, expected)
        if p < 1:
            expected = TopPLogitsWarper(p)(None, expected)
        ours = cut(logits, torch.full((50, 1), k), torch.full((50, 1), p, dtype=torch.float64))
        assert torch.equal(ours, expected), (k, p)


def test_noise_is_gumbel_s_and_a_function_of_seed_position_and_word():
    seeds = torch.arange(2000)
    words = word_keys(500, torch.device("cpu"))
    noise = gumbel(seeds, torch.full((2000,), 7), words).double()
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.006)
    assert float(noise.std()) == pytest.approx(1.28255, abs=0.006)
    # The same, wherever its row stands; another for every other seed, position and word.
    assert torch.equal(gumbel(seeds[[5, 3]], torch.tensor([7, 7]), words), noise[[5, 3]].float())
    others = torch.cat([noise[:20].float(), gumbel(seeds[:20], torch.full((20,), 8), words)])
    close = torch.corrcoef(others) - torch.eye(40)
    assert float(close.abs().max()) < 0.2
    assert float(torch.corrcoef(noise[:, :40].T).sub(torch.eye(40)).abs().max()) < 0.1


def test_what_a_neighbour_needs_changes_no_bit():
    """Every row under every set of parts that some neighbour might ask for."""
    rows = [
        Sampling(greedy=True), Sampling(seed=3), Sampling(seed=4, temperature=0.3),
        Sampling(greedy=True, repetition_penalty=1.5), Sampling(seed=5, top_k=3),
        Sampling(seed=6, top_p=0.5, repetition_penalty=3.0),
    ]  # fmt: skip
    made = choices(rows, 50)
    generator = torch.Generator().manual_seed(0)
    made.met.copy_(torch.rand(6, 50, generator=generator) < 0.3)
    for position in range(20):
        logits = torch.randn(6, 50, generator=generator)
        places = torch.full((6,), position)
        full = sample(logits, made, places, Needs(True, True, True))
        for row, sampling in enumerate(rows):
            assert sample(logits, made, places, sampling.needs)[row] == full[row]
        assert full[0] == logits[0].argmax()


def test_needs_add_up():
    both = Sampling(top_k=4).needs | Sampling(greedy=True, repetition_penalty=2.0).needs
    assert both == Needs(chance=True, penalty=True, cut=True)
    assert Sampling(greedy=True, top_k=4, top_p=0.5).needs == Needs(False, False, False)
