"""Teachers as folders."""

import pytest
import torch
from teachers import TEACHERS, build_model, build_tokenizer


@pytest.fixture
def save(tmp_path):
    """Saves a teacher, of a kind or with a config: save(kind) gives (folder, model)."""

    def make(kind="llama", shard="30KB", dtype=torch.float32, tokenizer=True):
        config = TEACHERS[kind]() if isinstance(kind, str) else kind
        model, folder = build_model(config).to(dtype), tmp_path / "teacher"
        model.save_pretrained(folder, max_shard_size=shard)
        if tokenizer:
            build_tokenizer().save_pretrained(folder)
        return folder, model

    return make
