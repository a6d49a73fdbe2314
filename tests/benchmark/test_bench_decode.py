"""`gsa bench decode`: models of equal size that write beside each other, on the CPU."""

import importlib.util
import json
from functools import partial

import pytest
import torch

from gsa.architectures import ARCHITECTURES, sized_alike
from gsa.benchmark.decode import BenchDecodeConfig, bench_decode, step_bytes
from gsa.benchmark.decode_plot import lines_of
from gsa.benchmark.decoders import contender
from gsa.benchmark.language_models import contenders, rival
from gsa.benchmark.plot import PlotConfig, bench_plot
from gsa.cli import main
from gsa.model import GSAConfig, GSAForCausalLM
from gsa.recipes import RECIPES

SMALL = {
    **{"size": "tiny", "vocab_size": 300, "prefix": 8, "lengths": (4, 8), "batches": (1, 3)},
    **{"batch_tokens": 4, "prefills": (16,), "repeats": 2, "device": "cpu", "dtype": "fp32"},
}
MODELS = {name: make().model for name, make in RECIPES.items()}
ARCHS = {name: partial(sized_alike, name) for name in ARCHITECTURES}
CPU = torch.device("cpu")


def test_a_run_is_measured_written_and_shown(tmp_path, capsys):
    out = tmp_path / "deep" / "decode.json"
    config = BenchDecodeConfig(**SMALL, out=str(out))
    document = bench_decode(config, MODELS, ARCHS)
    assert json.loads(out.read_text()) == json.loads(json.dumps(document)) and document["complete"]
    names = ["4 tokens in a row", "8 tokens in a row", "1 rows", "3 rows", "16 tokens read"]
    assert [row["case"] for row in document["rows"]] == names
    for row in document["rows"]:
        assert list(row["contenders"]) == ["gsa", "transformer++"] and not row["missing"]
        assert all(facts["seconds"] > 0 for facts in row["contenders"].values())
    step = document["rows"][3]["contenders"]["gsa"]
    assert step["tokens_per_s"] == pytest.approx(3 * 1e3 / step["ms_per_token"])
    assert step["of_floor"] == pytest.approx(step["floor_ms"] / step["ms_per_token"])
    assert len(step["turns"]) == 2 and step["tokens"] == 4
    printed = capsys.readouterr().out
    assert all(f"{name}: gsa " in printed for name in names)
    assert len(printed[printed.index("ours ×") :].splitlines()) == 11
    assert bench_plot(PlotConfig(results=(str(out),))) == out.with_suffix(".png")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_every_architecture_is_measured_and_drawn(tmp_path):
    """Those that keep every token have room for the case at hand, not for the longest."""
    names = [name for name in contenders(ARCHS) if name != "fla"]
    out = tmp_path / "all.json"
    options = SMALL | {"lengths": (4, 8), "batches": (0,), "prefills": (0,), "arch": tuple(names)}
    document = bench_decode(BenchDecodeConfig(**options, out=str(out)), MODELS, ARCHS)
    for row in document["rows"]:
        assert list(row["contenders"]) == names and not row["missing"]
        assert {facts["tokens"] for facts in row["contenders"].values()} == {row["number"]}
    assert bench_plot(PlotConfig(results=(str(out),))).read_bytes().startswith(b"\x89PNG")
    own = rival("own-transformer++", BenchDecodeConfig(**SMALL).keys(MODELS), ARCHS, longest=32)
    one = contender(own, CPU, torch.float32, compile=False)
    for tokens in (4, 8):
        one.begin(2, 8, tokens)
        assert one._decoder.pool.capacity == 8 + tokens + 8
        one.decode(tokens)
        one.end()
    assert one._decoder is None


def test_contenders_write_what_they_would_write_by_themselves():
    """The rival's loop with a static cache is its own greedy generate()."""
    keys = BenchDecodeConfig(**SMALL).keys(MODELS)
    llama = rival("transformer++", keys, ARCHS, longest=32)
    one = contender(llama, CPU, torch.float32, compile=False)
    heard = []
    forward = one.model.forward

    def listen(**inputs):
        output = forward(**inputs)
        heard.append(output.logits[:, -1].argmax(-1).tolist())
        return output

    one.model.forward = listen
    one.begin(2, 8, 6)
    one.decode(6)
    one.model.forward = forward
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (2, 8), generator=generator)
    made = one.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=11, min_new_tokens=11,
        do_sample=False, use_cache=True, eos_token_id=None,
    )  # fmt: skip
    assert torch.tensor(heard).T.tolist() == made[:, 8:].tolist()


def test_the_bytes_of_a_step():
    config = GSAConfig(**BenchDecodeConfig(**SMALL).keys(MODELS))
    model = GSAForCausalLM(config)
    memory = config.num_hidden_layers * 8 * 2 * (16 + 16) * 4  # M = 8 slots of two heads, fp32
    assert config.num_slots == 8 and config.num_heads == 2 and config.hidden_size == 32
    once = step_bytes(model, 0)
    assert step_bytes(model, 3) - once >= 6 * memory
    weights = sum(p.numel() for p in model.parameters()) * 4
    embedding = 0 if config.tie_word_embeddings else 300 * 32 * 4
    assert once == weights - embedding


def test_mistakes_are_explained(capsys):
    for arguments, words in (
        (["--arch", "gpt"], "own-transformer++, transformer++, fla, got 'gpt'"),
        (["--size", "huge"], "size: expected demo, tiny"),
        (["--prefix", "0"], "prefix: expected at least 1, got 0"),
        (["--batches", "-1"], "batches: expected numbers above 0"),
    ):
        assert main(["bench", "decode", "--device", "cpu", *arguments]) == 2
        assert words in capsys.readouterr().err
    if not importlib.util.find_spec("fla"):
        assert main(["bench", "decode", "--device", "cpu", "--arch", "fla", "--size=tiny"]) == 2
        assert "pip install 'gated-slots[peers]'" in capsys.readouterr().err
    base = {"benchmark": "decode", "environment": {"device": "A"}, "rows": []}
    with pytest.raises(ValueError, match="A, bf16; A, fp32"):
        lines_of([base | {"config": {"dtype": dtype}} for dtype in ("fp32", "bf16")])
    with pytest.raises(ValueError, match="no case was measured"):
        lines_of([base | {"config": {"dtype": "bf16"}}])
