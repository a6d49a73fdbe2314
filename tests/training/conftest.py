"""A small corpus as shards, and a configuration that trains on it in well under a second."""

import json
import random
from dataclasses import replace

import pytest
from training_runs import STOP, in_teams, one_thread, stopped_at, succeeded

from gsa.data import PrepareConfig, prepare
from gsa.recipes import tiny
from gsa.training import TrainConfig, train
from gsa.training.lock import RunLock

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


class Runs:
    """Configs of one small run in folders of their own, named <processes>-<what>."""

    def __init__(self, shards, folder):
        self.folder = folder
        train_shards, valid = map(str, shards)
        self.base = replace(tiny(), data=train_shards, validation=valid, steps=12, warmup=2,
                            checkpoint_interval=5, validation_interval=5,
                            validation_rows=12)  # fmt: skip

    def __call__(self, name, **changes) -> TrainConfig:
        model = self.base.model | changes.pop("model", {})
        return replace(self.base, out=str(self.folder / name), model=model, **changes)

    def at(self, name, inner=""):
        return self.folder / name / inner


VARIANTS = {
    "recomputed": {"recompute": 1, "accumulation": 2},
    "muon": {"optimizer": "muon"},
    "bf16": {"dtype": "bf16"},
    "half": {"dtype": "bf16", "master_weights": False},
    "no-mlp": {"model": {"intermediate_size": 0}},
}


@pytest.fixture(scope="session")
def runs(shard_folders, tmp_path_factory):
    """Runs of one process: whole, in two and four passes a step, stopped in step 7, variants."""
    made = Runs(shard_folders, tmp_path_factory.mktemp("runs"))
    with one_thread():
        for name, parts in (("1-whole", 1), ("1-halves", 2), ("1-quarters", 4)):
            train(made(name, rows=4 // parts, accumulation=parts))
        train(made("1-stopped"), objective=stopped_at(10))  # 7 steps and 3 batches of validation
        for name, changes in VARIANTS.items():
            train(made(f"1-{name}", **changes))
    return made


@pytest.fixture(scope="session")
def pair(runs):
    """The same in two processes, and what goes on from checkpoints."""
    ones, twos = (str(runs.at(f"{n}-stopped", STOP)) for n in (1, 2))
    first = str(runs.at("2-full", "checkpoints/step-00000005"))
    plain = ("auto", "next token")
    runs.at("2-locked").mkdir()
    with RunLock(runs.at("2-locked")):
        said = succeeded(
            in_teams(
                2,
                (runs("2-locked"), *plain),
                (runs("2-whole", prompt="the slot"), "auto", "recorded", str(runs.folder)),
                # The second process alone gets the signal: 7 steps and 2 batches of validation.
                (runs("2-stopped"), "auto", "stopped at", 9),
                (runs("2-on"), twos, "next token"),
                (runs("2-frozen-from-1"), ones, "never finite"),
                (runs("2-skipping"), "auto", "infinite at", 3),
                (runs("2-full"), "auto", "full disk at", 7, first),
                *[(runs(f"2-{name}", **changes), *plain) for name, changes in VARIANTS.items()],
            )
        )
    assert said.count(" ends: ") == 4, said  # both of 2-locked and 2-full
    return said
