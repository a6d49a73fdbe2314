"""Finding the layers that look things up: what heads attend to, and what near-sight costs."""

import json

import pytest
import torch
from teachers import TEACHERS, build_model

from gsa.cli import main
from gsa.conversion.recall import Questions
from gsa.conversion.retrieval import FIRST, NEAR, answers, shares_of_answers

LENGTH, DISTANCE, ANSWER = 80, 50, 2


def build(kind="llama"):
    model = build_model(TEACHERS[kind]())
    model.set_attn_implementation("eager")
    return model


def questions(rows=3):
    ids = torch.randint(2, 300, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    stated = LENGTH - DISTANCE - 2 * ANSWER
    ids[:, stated : stated + ANSWER] = ids[:, -ANSWER:]
    return Questions(DISTANCE, ids, (ANSWER,) * rows)


def test_a_head_that_looks_nowhere_gives_the_answer_its_share_and_one_that_looks_gives_more():
    model = build()
    queries = model.model.layers[1].self_attn.q_proj.weight.data
    queries.zero_()
    shares = shares_of_answers(model, questions())
    assert shares.shape == (3, 4)
    torch.testing.assert_close(shares[1], torch.full((4,), ANSWER / (LENGTH - ANSWER)))
    assert shares[0].std() > 0


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_near_sight_ends_where_it_should(kind):
    """One layer: beyond `NEAR` tokens back only the first few count, unless it may see far."""
    model = build(kind)
    model.model.layers = model.model.layers[:1]
    asked = questions(1)
    hidden = LENGTH - ANSWER - 1 - NEAR  # the farthest that the question's last token cannot see
    for place, far, same in (
        (hidden, [], True),
        (hidden + 1, [], False),
        (FIRST, [], True),
        (FIRST - 1, [], False),
        (hidden, [0], False),
    ):
        ids = asked.ids_BT.clone()
        ids[0, place] = 301
        before, after = (
            answers(model, Questions(DISTANCE, x[:, : 1 - ANSWER], (1,)), far)
            for x in (asked.ids_BT, ids)
        )
        assert (before.nats == after.nats) == same, (place, far)


def test_all_far_is_the_model_itself():
    model, asked = build(), questions()
    logits = model(asked.ids_BT).logits[:, -ANSWER - 1 : -1]
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), asked.ids_BT[:, -ANSWER:].flatten(), reduction="sum"
    )
    seen = answers(model, asked, [0, 1, 2])
    assert seen.nats == pytest.approx(float(wanted.detach()) / 3, rel=1e-5)
    assert seen.right == 0


def test_the_command(lesson, tmp_path, capsys):
    teacher, out = str(lesson[0]), str(tmp_path / "found.json")
    command = ["eval", "retrieval", teacher, "--data", lesson[4], "--distance", "60"]
    assert main([*command, "--layers", "2", "--texts", "3", "--out", out]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"--keep-layers {' '.join(map(str, sorted(found['layers'])))} --out" in said
    shares = torch.tensor(found["shares"]).amax(1)
    assert found["layers"] == shares.argsort(descending=True)[:2].tolist()
    assert [len(one["far"]) for one in found["sights"]] == [3, 2, 0]
    assert found["command"].startswith(f"gsa eval retrieval {teacher} --data ")
    assert found["environment"]["device"].startswith("cpu") and "torch" in found["environment"]
    assert main([*command, "--layers", "4"]) == 2
    assert "layers: expected at most 3, got 4" in capsys.readouterr().err
