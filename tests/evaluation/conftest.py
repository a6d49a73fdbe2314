"""Folders of tiny models with the byte tokenizer."""

import pytest
from local_tasks import write_tasks
from tiny_models import VARIANTS, build_tiny

from gsa.data.byte_tokenizer import EOS_ID, VOCAB_SIZE, save_byte_tokenizer


@pytest.fixture
def save_model(tmp_path):
    """Saves a tiny model of a variant of `VARIANTS`; returns its folder."""

    def save(variant="paper", **changes):
        folder = tmp_path / variant
        sizes = {"vocab_size": VOCAB_SIZE, "eos_token_id": EOS_ID, "max_position_embeddings": 64}
        model = build_tiny(**(VARIANTS[variant] | sizes | changes))
        model.save_pretrained(folder)
        save_byte_tokenizer(folder)
        return folder

    return save


@pytest.fixture
def data_dir(tmp_path):
    """A folder for --data-dir with all of `LOCAL`."""
    return write_tasks(tmp_path / "local")
