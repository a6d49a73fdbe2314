"""Teachers as folders, and a lesson: a teacher, its student and the text to learn."""

import json
from dataclasses import replace

import pytest
import torch
from teachers import LESSON, ROW, TEACHERS, build_model, build_tokenizer
from transformers import LlamaConfig

from gsa.conversion import ConvertConfig, DistillConfig, convert
from gsa.data import PrepareConfig, prepare

WORDS = ["the", "slot", "forgets", "what", "gate", "lets", "go", "and", "remembers", "was", "read"]


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


@pytest.fixture
def lesson(save, tmp_path):
    """(teacher's folder, its model, student's folder, training shards, held-out shards)"""
    teacher, model = save(LlamaConfig(**LESSON))
    student = tmp_path / "student"
    convert(ConvertConfig(teacher=str(teacher), out=str(student), slots=8, keep_layers=(1,)))
    rng = torch.Generator().manual_seed(0)
    shards = []
    for name, documents in (("train", 300), ("held-out", 20)):
        text = tmp_path / f"{name}.jsonl"
        with text.open("w") as file:
            for _ in range(documents):
                words = torch.randint(len(WORDS), (int(torch.randint(3, 40, (1,), generator=rng)),),
                                      generator=rng)  # fmt: skip
                file.write(json.dumps({"text": " ".join(WORDS[i] for i in words)}) + "\n")
        out = str(tmp_path / name)
        prepare(PrepareConfig(inputs=(str(text),), out=out, tokenizer=str(teacher), quiet=True))
        shards.append(out)
    return teacher, model, student, *shards


@pytest.fixture
def make_config(lesson, tmp_path):
    def make(**options):
        base = DistillConfig(
            student=str(lesson[2]), data=lesson[3], validation=lesson[4],
            out=str(tmp_path / "run"), preset="smoke", tokens=40 * 4 * ROW, seq_len=ROW, rows=4,
            checkpoint_interval=10, recall_texts=4, recall_distances=(48,),
        )  # fmt: skip
        return replace(base, **options)

    return make
