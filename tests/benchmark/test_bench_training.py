"""`gsa bench training`: models of equal size in turns, on the CPU."""

import json
import statistics
from functools import partial

import pytest
import torch

from gsa.architectures import ARCHITECTURES, sized_alike
from gsa.benchmark import training
from gsa.benchmark.language_models import OWN, contenders, rival
from gsa.benchmark.plot import PlotConfig, bench_plot
from gsa.benchmark.training import BenchTrainingConfig, Trainee, bench_training, measure_case
from gsa.benchmark.training_plot import lines_of, looks
from gsa.model import GSAConfig
from gsa.model.cost import count_parameters
from gsa.recipes import RECIPES

imread = pytest.importorskip("matplotlib.image").imread

SMALL = {
    **{"size": "tiny", "vocab_size": 300, "tokens": 64, "lengths": (16, 32), "steps": 1},
    **{"eager": True, "device": "cpu"},
}
MODELS = {name: make().model for name, make in RECIPES.items()}
ARCHS = {name: partial(sized_alike, name) for name in ARCHITECTURES}
CPU = torch.device("cpu")


def made(name, config, packed=False):
    """A contender for rows of at most 32 tokens."""
    return rival(name, config.keys(MODELS), ARCHS, longest=32, packed=packed)


def test_a_run_is_measured_written_and_shown(tmp_path, capsys):
    out = tmp_path / "deep" / "training.json"
    config = BenchTrainingConfig(**SMALL, repeats=2, out=str(out))
    document = bench_training(config, MODELS, ARCHS)
    assert json.loads(out.read_text()) == json.loads(json.dumps(document)) and document["complete"]
    names = ["T=16", "T=32", "T=16, recompute 1", "T=32, recompute 1"]
    assert [row["case"] for row in document["rows"]] == names
    assert [row["rows"] for row in document["rows"]] == [4, 2, 4, 2]
    assert document["parameters"]["gsa"] == count_parameters(GSAConfig(**config.keys(MODELS))).total
    for row in document["rows"]:
        assert list(row["contenders"]) == ["gsa", "transformer++"] and not row["missing"]
        for facts in row["contenders"].values():
            assert len(facts["turns"]) == 2
            assert facts["tokens_per_s"] == statistics.median(facts["turns"])
    printed = capsys.readouterr().out
    assert all(f"{name}: gsa " in printed for name in names)
    table = printed[printed.index("K tokens/s  ") :].splitlines()[1:]
    assert len(table) == 8 and table[-1].startswith("T=32, recompute 1")
    drawn = bench_plot(PlotConfig(results=(str(out),)))
    assert drawn == out.with_suffix(".png") and imread(drawn).shape[2] == 4


def test_results_that_cannot_share_a_plot(tmp_path):
    base = {"benchmark": "training", "environment": {"device": "A"}, "rows": []}
    kinds = [base | {"config": {"weights": weights}} for weights in ("fp32", "bf16")]
    with pytest.raises(ValueError, match="A, bf16 weights; A, fp32 weights"):
        lines_of(kinds)
    with pytest.raises(ValueError, match="no case was measured"):
        lines_of(kinds[:1])
    paths = [tmp_path / f"{i}.json" for i in range(2)]
    for path, kind in zip(paths, ("training", "ops-gpu"), strict=True):
        path.write_text(json.dumps(base | {"benchmark": kind}))
    with pytest.raises(ValueError, match="expected one kind, got ops-gpu and training"):
        bench_plot(PlotConfig(results=tuple(map(str, paths))))


def test_models_are_of_equal_size_at_1_3b():
    config = BenchTrainingConfig(layers=1)
    with torch.device("meta"):
        found = {
            name: sum(p.numel() for p in made(name, config).build().parameters())
            for name in (*ARCHITECTURES, OWN + "transformer++")
        }
    sizes = [number / found["gsa"] for number in found.values()]
    assert max(sizes) < 1.02 and min(sizes) > 0.98
    assert found["gsa"] == count_parameters(GSAConfig(**config.keys(MODELS))).total


def test_every_architecture_is_measured_and_drawn(tmp_path):
    """All of them at once, and Transformer++ as transformers has it and as we do."""
    names = [name for name in contenders(ARCHS) if name != "fla"]
    assert set(names) == {*ARCHITECTURES, OWN + "transformer++"}
    out = tmp_path / "all.json"
    options = SMALL | {"lengths": (16,), "recompute": (0,), "arch": tuple(names)}
    document = bench_training(
        BenchTrainingConfig(**options, repeats=1, out=str(out)), MODELS, ARCHS
    )
    assert list(document["rows"][0]["contenders"]) == names
    assert [note.split(":")[0] for note in document["notes"]] == ["transformer++"]
    assert len(set(looks(names).values())) == len(names) + 1
    assert imread(bench_plot(PlotConfig(results=(str(out),)))).shape[2] == 4


@pytest.mark.parametrize("name", ["gsa", "transformer++"])
def test_a_step_trains_and_the_loss_is_the_models_own(name):
    config = BenchTrainingConfig(**SMALL)
    trainee = Trainee(made(name, config), config, CPU)
    tokens = torch.randint(300, (2, 32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = trainee.model(input_ids=tokens, labels=tokens).loss.item()
    before = [p.detach().clone() for p in trainee.parameters]
    trainee.recompute(1)
    assert trainee.step(tokens) == pytest.approx(expected, rel=1e-2)
    moved = [not torch.equal(a, b) for a, b in zip(before, trainee.parameters, strict=True)]
    assert all(moved) and all(p.grad is None for p in trainee.parameters)
    held = sum(p.numel() for p in trainee.parameters) * 4
    assert held * 3 <= trainee.bytes() < held * 3.1, "weights and two moments"


def test_packed_rows_have_the_same_loss():
    config = BenchTrainingConfig(**SMALL)
    apart, packed = made("gsa", config), made("gsa", config, packed=True)
    built = apart.build().double()
    tokens = torch.randint(300, (3, 32))
    expected = apart.loss(built, tokens)
    torch.testing.assert_close(packed.loss(built, tokens), expected, rtol=1e-12, atol=0)


def test_bf16_weights_have_bf16_moments_and_lean_and_packed_reach_the_model(monkeypatch):
    asked = []
    monkeypatch.setattr(training, "prepare_blocks", lambda model, settings: asked.append(settings))
    options = {**SMALL, "eager": False, "lean": True, "packed": True, "weights": "bf16"}
    config = BenchTrainingConfig(**options, repeats=1, arch=("gsa",), recompute=(0,))
    bench_training(config, MODELS, ARCHS)
    assert [(one.compile, one.lean) for one in asked] == [(True, True)]
    trainee = Trainee(made("gsa", config, packed=True), config, CPU)
    bounds = []
    trainee.model.register_forward_pre_hook(
        lambda _, args, named: bounds.append(named["cu_seqlens"].tolist()), with_kwargs=True
    )
    trainee.step(torch.randint(300, (2, 32)))
    assert bounds == [[0, 32, 64]]
    numbers = sum(p.numel() for p in trainee.parameters)
    assert numbers * 6 <= trainee.bytes() < numbers * 6.2, "weights and two moments in bf16"


def test_flops_of_the_transformer():
    config = BenchTrainingConfig(**SMALL)
    one, keys = made("transformer++", config), config.keys(MODELS)
    model = one.build()
    D, layers = keys["hidden_size"], keys["num_hidden_layers"]
    weights = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)
    )
    seen = (32 + 1) / 2  # each token sees itself and those before it
    assert one.flops(model, 32) == pytest.approx(6 * weights + 3 * 4 * D * seen * layers)


def test_who_runs_out_of_memory_is_named_and_the_rest_measured(monkeypatch):
    config = BenchTrainingConfig(**SMALL, repeats=1)
    trainees = {n: Trainee(made(n, config), config, CPU) for n in config.arch}

    def step(tokens):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(trainees["transformer++"], "step", step)
    row = measure_case(config, trainees, 0, 32, CPU)
    assert row["missing"] == {"transformer++": "out of memory"}
    assert list(row["contenders"]) == ["gsa"]
    table = training.training_table({"rows": [row], "not_run": ["T=64"]})
    assert "transformer++  out of memory" in table and table.endswith("not run: T=64")


def test_what_does_not_fit_the_budget_is_left_out(capsys):
    config = BenchTrainingConfig(**SMALL, repeats=1, budget_seconds=1e-3)
    document = bench_training(config, MODELS, ARCHS)
    assert not document["complete"] and document["rows"] == []
    assert "not run: T=16; T=32; T=16, recompute 1; T=32, recompute 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": (48,), "tokens": 64}, "lengths: expected at least 2, dividing tokens = 64"),
        ({"repeats": 0}, "repeats: expected at least 1, got 0"),
    ],
)
def test_wrong_settings_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        BenchTrainingConfig(**options)
    with pytest.raises(ValueError, match="size: expected demo, tiny,"):
        bench_training(BenchTrainingConfig(size="9b", device="cpu"), MODELS, ARCHS)
    with pytest.raises(ValueError, match=r"arch: expected gsa, abc, .*fla, got 'rwkv'"):
        bench_training(BenchTrainingConfig(arch=("gsa", "rwkv"), device="cpu"), MODELS, ARCHS)
