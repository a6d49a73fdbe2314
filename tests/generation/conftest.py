"""Tiny fp64 models (`tests/tiny_models.py`) and a folder with a byte-level one."""

import pytest
import torch
from tiny_models import VARIANTS, build_tiny

from gsa.data import save_byte_tokenizer
from gsa.model import GSAConfig, GSAForCausalLM


@pytest.fixture(params=VARIANTS)
def model(request):
    """A tiny fp64 language model of each variant in turn."""
    return build_tiny(**VARIANTS[request.param])


@pytest.fixture
def prompts():
    """Random texts: prompts(count, seed=0), each of another length."""

    def draw(count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        lengths = [1 + (5 * i + 3) % 11 for i in range(count)]
        return [torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths]

    return draw


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random byte-level model with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = GSAConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_heads=2, num_slots=8,
        intermediate_size=64, initializer_range=0.3, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    GSAForCausalLM(config).save_pretrained(path)
    save_byte_tokenizer(path)
    return path
