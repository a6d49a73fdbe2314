"""Tiny models, one per way of remembering (`tests/tiny_models.py`), as fixtures."""

import pytest
import torch
from tiny_models import VARIANTS, build_tiny


@pytest.fixture(params=VARIANTS)
def variant(request):
    """The options of each variant in turn."""
    return VARIANTS[request.param]


@pytest.fixture
def tiny():
    """Builds a tiny fp64 language model: tiny(seed=0, **config)."""
    return build_tiny


@pytest.fixture
def model(variant):
    """A tiny fp64 language model of each variant in turn."""
    return build_tiny(**variant)


@pytest.fixture
def token_ids():
    """Random token ids: token_ids(rows, tokens, seed=0), never the padding token."""

    def draw(rows, tokens, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 40, (rows, tokens), generator=generator)

    return draw
