"""A small corpus as shards, and a configuration that trains on it in well under a second."""

import json
import random
from dataclasses import replace

import pytest

from gsa.data import PrepareConfig, prepare
from gsa.recipes import tiny

WORDS = [
    "the",
    "slot",
    "gate",
    "memory",
    "forgets",
    "what",
    "it",
    "wrote",
    "and",
    "reads",
    "again",
    "softly",
]


def write_corpus(path, *, documents, seed):
    """Documents of very different lengths, so that rows differ in how many labels count."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for i in range(documents):
            length = 1 if i % 3 == 0 else rng.randint(2, 60)
            file.write(json.dumps({"text": " ".join(rng.choices(WORDS, k=length))}) + "\n")


@pytest.fixture(scope="session")
def shard_folders(tmp_path_factory):
    """(training shards, validation shards) as paths."""
    folder = tmp_path_factory.mktemp("shards")
    write_corpus(folder / "seen.jsonl", documents=120, seed=0)
    write_corpus(folder / "unseen.jsonl", documents=12, seed=1)
    for name, text in (("train", "seen.jsonl"), ("valid", "unseen.jsonl")):
        prepare(PrepareConfig(inputs=(str(folder / text),), out=str(folder / name), quiet=True))
    return folder / "train", folder / "valid"


@pytest.fixture
def make_config(shard_folders, tmp_path):
    """A function of overrides that returns a TrainConfig; its `out` is tmp_path/run."""

    def make(**overrides):
        train, valid = shard_folders
        base = replace(
            tiny(),
            data=str(train),
            validation=str(valid),
            out=str(tmp_path / "run"),
            steps=12,
            warmup=2,
            checkpoint_interval=5,
            validation_interval=5,
            validation_rows=4,
        )
        model = base.model | overrides.pop("model", {})
        return replace(base, **overrides, model=model)

    return make
