"""MQAR: what an example holds, that it is a function of seed and index alone, and who solves it."""

import os
import signal

import numpy as np
import pytest
import torch
from training_runs import one_thread

from gsa.experiments.arms import StoppedError
from gsa.experiments.figure3a import SIZES, model_keys
from gsa.experiments.mqar import HELD_OUT, MQARRows, Task, answers_of, example, recall_loss
from gsa.experiments.recall_run import Examples, train_recall
from gsa.model import GSAConfig, GSAForCausalLM
from gsa.training import RunError, TrainConfig
from gsa.training.lock import RunLock
from gsa.training.objective import num_targets

TINY = SIZES["tiny"]
PAPER = Task()
FIXED = [4, 12, 1, 10, 4, 0, 0, 0, 0, 0, 1, 0]


def test_an_example_is_keys_and_values_then_each_key_once():
    inputs, places, values = example(PAPER, 3, 11)
    keys, stored = inputs[:128:2], inputs[1:128:2]
    assert len(set(keys)) == len(set(stored)) == 64
    assert keys.min() >= 1 and keys.max() < 4096 <= stored.min() and stored.max() < 8192
    assert sorted(set(places)) == sorted(places) and places.min() >= 128 and not (places % 2).any()
    answer = dict(zip(keys.tolist(), stored.tolist(), strict=True))
    assert [answer[key] for key in inputs[places].tolist()] == values.tolist()
    assert np.count_nonzero(inputs[128:]) == 64


def test_an_example_is_a_function_of_seed_and_index():
    task = Task(seq_len=12, pairs=2, vocab_size=16)
    assert example(task, 5, 7).inputs.tolist() == FIXED
    others = [example(task, seed, i).inputs.tolist() for seed, i in ((7, 5), (5, 8), (5, HELD_OUT))]
    assert FIXED not in others


def test_gaps_follow_the_power_law():
    """Of one pair, where sequential drawing does not matter, gap g has weight (g + 1)^(a − 1)."""
    task = Task(seq_len=18, pairs=1, vocab_size=16)
    gaps = [(int(example(task, 0, i).places[0]) - 2) // 2 for i in range(4000)]
    found = np.bincount(gaps, minlength=8) / 4000
    expected = np.arange(1, 9) ** (task.power - 1)
    expected /= expected.sum()
    assert np.abs(found - expected).max() < 4 * np.sqrt(expected.max() / 4000)


def test_rows_come_once_an_epoch_and_in_parts():
    task = Task(seq_len=12, pairs=2, vocab_size=16)
    rows = MQARRows(task, seed=1, first=0, count=10, shuffled=True)
    both = rows.batch(0, 20).input_ids.view(20, 12)
    made = sorted(example(task, 1, i).inputs.tolist() for i in range(10))
    assert sorted(both[:10].tolist()) == sorted(both[10:].tolist()) == made
    assert both[:10].tolist() != both[10:].tolist()
    parts = [rows.share(4, 12, rank, 3) for rank in range(3)]
    joined = torch.cat([part.labels for part in parts], 1)
    assert torch.equal(joined, rows.batch(4, 12).labels)
    in_order = MQARRows(task, seed=1, first=HELD_OUT, count=3, shuffled=False).batch(2, 2)
    expected = [example(task, 1, HELD_OUT + i).inputs.tolist() for i in (2, 0)]
    assert in_order.input_ids.view(2, 12).tolist() == expected


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_only_answers_are_learned():
    """The loss is that of the values, from the model's logits at the keys asked for."""
    rows = MQARRows(TINY.task, seed=0, first=0, count=4, shuffled=False)
    batch = rows.batch(0, 4)
    assert num_targets(batch) == 16
    torch.manual_seed(0)
    model = GSAForCausalLM(GSAConfig(**model_keys("gsa", 16, TINY))).double()
    logits, answers = answers_of(TINY.task, model, batch)
    full = model(input_ids=batch.input_ids.view(4, -1)).logits
    total = 0.0
    for i in range(4):
        _, places, values = example(TINY.task, 0, i)
        for place, value in sorted(zip(places.tolist(), values.tolist(), strict=True)):
            total -= full[i, place].log_softmax(0)[value].item()
    assert answers.shape == (16,) and logits.shape == (16, 64)
    assert recall_loss(TINY.task)(model, batch).item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"seq_len": 255}, "seq_len: expected an even number"),
        ({"seq_len": 254}, "four tokens for each of pairs = 64"),
        ({"vocab_size": 128}, "vocab_size: expected an even number of at least"),
        ({"power": 0.0}, "power: expected a number above 0"),
    ],
)
def test_a_task_without_room_is_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        Task(**sizes)


def recall_config(out, *, width=64, steps, rows=32, **changes):
    model = model_keys("gsa", width, TINY) | changes
    return TrainConfig(name="recall", data="mqar", out=str(out), model=model, rows=rows,
                       seq_len=TINY.task.seq_len, steps=steps, lr=1e-2, min_lr=0.0, warmup=0,
                       weight_decay=0.1, beta2=0.999)  # fmt: skip


def test_slots_solve_it_and_one_slot_does_not(tmp_path):
    examples = Examples(train=3200, held_out=200, epochs=6)
    with one_thread():
        found = train_recall(recall_config(tmp_path / "16", steps=600), TINY.task, examples,
                             enough=0.95)  # fmt: skip
        assert found["accuracy"] >= 0.95 and found["steps"] <= 600
        examples = Examples(train=3200, held_out=200, epochs=2)
        one = recall_config(tmp_path / "1", steps=200, num_slots=1)
        poor = train_recall(one, TINY.task, examples)
    assert poor["steps"] == 200 and poor["accuracy"] < 0.4  # one of four values: 0.25


def test_a_stopped_model_goes_on_bit_for_bit(tmp_path):
    task = TINY.task
    examples = Examples(train=16, held_out=8, epochs=3)
    whole = train_recall(
        recall_config(tmp_path / "whole", width=16, steps=12, rows=4), task, examples
    )

    def stop_once(text):
        if "step 4 of" in text:
            os.kill(os.getpid(), signal.SIGUSR1)

    stopped = recall_config(tmp_path / "stopped", width=16, steps=12, rows=4)
    with pytest.raises(StoppedError) as caught:
        train_recall(stopped, task, examples, say=stop_once)
    assert caught.value.signal == signal.SIGUSR1
    said = []
    resumed = train_recall(stopped, task, examples, say=said.append)
    assert said[0].endswith("step-00000004")
    losses = [
        [(h["step"], h["loss"], h["accuracy"]) for h in r["history"]] for r in (whole, resumed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_loss_that_is_not_finite_ends_it(tmp_path):
    run = recall_config(tmp_path / "run", width=16, steps=40, rows=4, initializer_range=1e30)
    found = train_recall(run, TINY.task, Examples(train=160, held_out=8, epochs=1))
    assert found["diverged"] and found["steps"] == run.nan_limit + 1


def test_a_folder_in_use_is_refused(tmp_path):
    run = recall_config(tmp_path, width=16, steps=4, rows=4)
    with RunLock(tmp_path), pytest.raises(RunError, match="in use by another run"):
        train_recall(run, TINY.task, Examples(train=16, held_out=8, epochs=1))
