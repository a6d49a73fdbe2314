"""The next token by the kernel (on a GPU, or in Triton's interpreter) is the one by torch."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

from gsa.generation import Sampling
from gsa.generation.progress import Progress
from gsa.generation.sampling import Choices

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = [
    Sampling(greedy=True), Sampling(seed=3), Sampling(seed=2**63 - 1, temperature=0.3),
    Sampling(greedy=True, repetition_penalty=1.5), Sampling(seed=5, top_k=3),
    Sampling(seed=6, top_p=0.5, repetition_penalty=3.0), Sampling(seed=7),
]  # fmt: skip
STATE = ("token", "position", "left", "live", "stops", "emitted", "asleep", "places")


def pool(words, by_kernel):
    """A pool of ROWS whose last row is at rest."""
    at, choices = Progress(len(ROWS), DEVICE), Choices(len(ROWS), words, DEVICE)
    at.by_kernel = by_kernel
    for row, sampling in enumerate(ROWS):
        choices.put(row, sampling)
        at.start(row, row, 10 * row, 2 if row == 1 else 99, {row % 3, words - 1})
    at.rest(len(ROWS) - 1)
    choices.met.copy_(
        torch.rand(choices.met.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    )
    return at, choices


@pytest.mark.parametrize("words", [8, 130, 9001])
@pytest.mark.parametrize("whose", [range(7), [0, 6], [1, 2], [0, 3, 6]], ids=str)
def test_the_kernel_chooses_what_torch_chooses(words, whose):
    """Until the rows have ended, under what all rows ask for and under what some do."""
    (ours, choices), (theirs, same) = pool(words, True), pool(words, False)
    needs = ROWS[whose[0]].needs
    for row in whose:
        needs |= ROWS[row].needs
    rng = torch.Generator().manual_seed(words)
    for _ in range(4):
        logits = (4 * torch.randn(len(ROWS), words, generator=rng)).half().to(DEVICE)
        ours.advance(logits, choices, needs)
        theirs.advance(logits, same, needs)
        for name in STATE:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert torch.equal(choices.met, same.met)
        assert torch.equal(ours.asleep[:, 0], ~ours.live)
    assert not ours.live[1] and ours.emitted[0, 6] == -1 and ours.position[6] == 60


@pytest.mark.parametrize("by_kernel", [True, False])
def test_equal_infinite_and_missing_logits(by_kernel):
    """The first of equals; NaN counts as the most; a token is one of the words whatever comes."""
    at, choices = pool(300, by_kernel)
    logits = torch.zeros(len(ROWS), 300, device=DEVICE)
    logits[0, [7, 200]] = 3.0
    logits[1, [40, 41]] = torch.nan
    logits[2, 250] = torch.inf
    logits[3] = -torch.inf
    logits[4], logits[5] = torch.nan, -torch.inf
    needs = ROWS[1].needs | ROWS[3].needs
    at.advance(logits, choices, needs)
    assert at.token.tolist()[:5] == [7, 40, 250, 0, 0]
    assert 0 <= int(at.token[5]) < 300


def test_at_rest_a_step_changes_nothing():
    at, choices = pool(50, True)
    before = {name: getattr(at, name).clone() for name in STATE if name != "emitted"}
    met = choices.met.clone()
    with at.all_at_rest():
        at.advance(torch.randn(len(ROWS), 50, device=DEVICE), choices, ROWS[0].needs)
        assert at.emitted.tolist() == [[-1] * len(ROWS), [0] * len(ROWS)]
    assert all(torch.equal(getattr(at, name), x) for name, x in before.items())
    assert torch.equal(choices.met, met)
