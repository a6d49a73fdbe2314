"""What a student has: the teacher's weights to the bit, new ones as asked, a folder that opens."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from teachers import SIZES, TEACHERS, build_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig

from gsa.cli import main
from gsa.conversion import ConvertConfig, convert
from gsa.conversion.families import FAMILIES
from gsa.conversion.student import student_config
from gsa.conversion.teacher import Teacher
from gsa.layers.rope import rotate
from gsa.model import GSAForCausalLM
from gsa.model.cost import count_parameters, state_bytes


def student_of(folder, out, **options):
    made = convert(ConvertConfig(teacher=str(folder), out=str(out), **options))
    return made.report, GSAForCausalLM.from_pretrained(out)


PARTS = ("weight", "bias")


def weights_in(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("kind", TEACHERS)
def test_the_teachers_weights_are_there_to_the_bit(kind, save, tmp_path):
    folder, model = save(kind, dtype=torch.bfloat16)
    report, student = student_of(folder, tmp_path / "out", slots=5, keep_layers=(1,))
    theirs, ours = model.state_dict(), weights_in(tmp_path / "out")
    family = FAMILIES[model.config.model_type]
    tied = model.config.tie_word_embeddings
    for name, weight in theirs.items():
        if tied and name == "lm_head.weight":
            assert name not in ours
            continue
        assert torch.equal(ours[family.to_student(name)], weight), name
        assert family.to_teacher(family.to_student(name)) == name
    assert report["copied"] == {
        name: family.to_teacher(name) for name in ours if family.to_teacher(name)
    }
    new = {f"model.layers.{i}.attn.f_proj.{part}" for i in (0, 2) for part in ("weight", "bias")}
    assert set(ours) - set(report["copied"]) == set(report["new"]) == new
    assert {weight.dtype for weight in ours.values()} == {torch.bfloat16} == {student.dtype}
    head = student.lm_head.weight is student.model.embeddings.weight
    assert head == tied == student.config.tie_word_embeddings

    config = student.config
    assert config.mixer_options(0).kv_heads == model.config.num_key_value_heads
    assert config.mixer_options(0).rope_theta == model.config.rope_parameters["rope_theta"]
    assert config.mixer_options(0).slots == config.num_slots == 5
    assert config.layer_types[1] != "linear_attention" == config.layer_types[0]
    ids = torch.arange(12)[None]
    labels = student(ids, labels=ids)
    labels.loss.backward()
    assert torch.isfinite(labels.logits).all()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())
    assert student.model.layers[0].attn.f_proj.weight.grad.abs().max() > 0


def test_new_weights_are_those_of_a_fresh_model_whatever_the_files(save, tmp_path):
    folder, _ = save("mistral", shard="1GB")
    assert [file.name for file in folder.glob("model*")] == ["model.safetensors"]
    student_of(folder, tmp_path / "one", slots=16, target="gsa")
    assert [file.name for file in (tmp_path / "one").glob("model*")] == ["model.safetensors"]
    (folder / "model.safetensors").unlink()
    folder, _ = save("mistral", shard="4KB")
    report, student = student_of(folder, tmp_path / "many", slots=16, target="gsa")
    files = sorted(file.name for file in (tmp_path / "many").glob("model*"))
    assert len(files) > 8 and files[-1] == "model.safetensors.index.json"
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files[:-1]
    one, many = weights_in(tmp_path / "one"), weights_in(tmp_path / "many")
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in many.values())
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)

    gates = torch.stack([many[name] for name in many if name.endswith("f_proj.weight")])
    std = student.config.initializer_range
    assert 0.9 * std < gates.std() < 1.1 * std and abs(gates.mean()) < 0.1 * std
    assert not torch.equal(gates[0], gates[1])
    for name in report["new"]:
        assert "f_proj" in name or torch.equal(many[name], torch.ones_like(many[name]))

    student_of(folder, tmp_path / "other", slots=16, target="gsa", seed=1)
    name = "model.layers.0.attn.f_proj.weight"
    assert not torch.equal(weights_in(tmp_path / "other")[name], many[name])


def test_options_do_what_they_say(save, tmp_path):
    folder, model = save("qwen3")
    _, student = student_of(
        folder,
        tmp_path / "out",
        target="gsa",
        slots=4,
        tau=16.0,
        feature_map="t2r",
        gate_init="pooled_keys",
        model={"value_activation": "identity", "scale": "rsqrt_key", "output_gate": True},
    )
    options = student.config.mixer_options(0)
    assert options.gate_logit_normalizer == 16 and options.score_scale == 12**-0.5
    assert options.value_activation == "identity" and options.rope_theta is None
    attention = student.model.layers[2].attn
    assert torch.equal(attention.feature_map.layer.weight, torch.eye(12))
    std = student.config.initializer_range
    assert 0.8 * std < attention.g_proj.weight.std() < 1.2 * std
    # Two heads of 12 rows of keys, 4 slots: means over 3 rows each.
    keys = model.model.layers[2].self_attn.k_proj.weight
    expected = keys.view(2, 4, 3, 24).mean(2).flatten(0, 1)
    torch.testing.assert_close(attention.f_proj.weight, expected)


def test_gates_spread_over_the_slots(save, tmp_path):
    folder, _ = save("llama")
    _, student = student_of(folder, tmp_path / "out", slots=4, gate_init="spread", model={})
    gate = student.model.layers[1].attn.f_proj
    assert torch.equal(gate.bias, torch.tensor([0.0, 2.0, 4.0, 6.0] * 2))
    std = student.config.initializer_range
    assert 0.7 * std < gate.weight.std() < 1.3 * std


@pytest.mark.parametrize("kind", ["llama 3", "qwen2", "qwen3"])
def test_a_window_as_long_as_the_text_is_the_teacher(kind, save, tmp_path):
    """With its share at 1, the branch beside the slots is the teacher's attention."""
    folder, model = save(kind)
    report, student = student_of(folder, tmp_path / "out", window=40, slots=4)
    new = {name.split(".", 4)[-1] for name in report["new"]}
    assert new == {f"{layer}.{part}" for layer in ("f_proj", "share_proj") for part in PARTS}
    ids = torch.arange(5 if kind == "qwen2" else 40)[None] + 3
    with torch.no_grad():
        wanted, mixed = model(ids).logits, student(ids).logits
        for block in student.model.layers:
            assert torch.equal(block.attn.share_proj.bias, torch.zeros(4))
            block.attn.window_share = 1.0
        torch.testing.assert_close(student(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        assert (mixed - wanted).abs().max() > 0.1


def test_a_static_gate_spreads_over_its_slots(save, tmp_path):
    folder, _ = save()
    _, student = student_of(folder, tmp_path / "out", model={"gate": "data_independent"}, slots=3)
    logits = student.model.layers[1].attn.f_proj.logits
    assert torch.equal(logits, torch.tensor([[0.0, 3.0, 6.0]]).expand(2, 3))


def test_a_head_saved_although_tied_is_left_out(save, tmp_path):
    folder, model = save("smollm2", shard="1GB")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report, student = student_of(folder, tmp_path / "out")
    assert set(report["left_out"]) == {
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    }
    assert "lm_head.weight" not in weights_in(tmp_path / "out")
    assert student.lm_head.weight is student.model.embeddings.weight


def test_the_report_names_teacher_options_and_versions(save, tmp_path):
    folder, _ = save("qwen2")
    report, _ = student_of(folder, tmp_path / "out", keep_layers=(2, 0), check_tokens=0)
    assert json.loads((tmp_path / "out/conversion.json").read_text()) == json.loads(
        json.dumps(report)
    )
    assert report["teacher"]["family"] == "qwen2"
    for file, digest in report["teacher"]["files"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
    assert len(report["teacher"]["files"]) > 2
    assert report["layers"] == {"converted": [1], "kept": [0, 2]}
    assert report["options"]["slots"] == 64 and report["check"] is None
    assert report["versions"]["torch"] == torch.__version__


def test_tokenizer_and_generation_settings_come_along(save, tmp_path, capsys):
    folder, model = save("smollm2")
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.generation_config.save_pretrained(folder)
    out = tmp_path / "out"
    assert main(["convert", str(folder), "--out", str(out), "--slots", "8"]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 3 layers of slots, 0 kept; 29 weights copied, 6 new" in printed
    assert "with every layer kept, logits on 64 tokens are off by" in printed
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()
    theirs, ours = (AutoTokenizer.from_pretrained(place) for place in (folder, out))
    text = "the slot forgets; ä gate remembers"
    assert ours(text).input_ids == theirs(text).input_ids
    chat = [{"role": "user", "content": "read"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "user: read\n"
    student = AutoModelForCausalLM.from_pretrained(out)
    assert student.generation_config.temperature == 0.7
    command = ["generate", str(out), "--prompt", "the slot", "--max-new-tokens", "5", "--seed", "1"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("the slot")


def test_the_tokenizer_of_mistral_comes_along(tmp_path):
    """A tokenizer of the real size, and a teacher in the shape that the paper converts."""
    pytest.importorskip("mistral_common")
    from gsa.data.encoding import load_encoder

    folder = tmp_path / "teacher"
    config = MistralConfig(**SIZES | dict(vocab_size=32000, num_hidden_layers=1))
    build_model(config).save_pretrained(folder)
    load_encoder("mistral").save(folder)
    student_of(folder, tmp_path / "out")
    theirs, ours = (AutoTokenizer.from_pretrained(place) for place in (folder, tmp_path / "out"))
    text = "Gated slots: forget, write, read."
    assert ours(text).input_ids == theirs(text).input_ids and len(ours) == 32000


def test_a_tokenizer_known_by_its_model_only_is_written_anew(save, tmp_path):
    """A Qwen2 folder with vocab.json and merges.txt: its class follows from model_type alone."""
    folder, _ = save("qwen2")
    wanted = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    model = json.loads(wanted.to_str())["model"]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    student_of(folder, tmp_path / "out")
    theirs, ours = (AutoTokenizer.from_pretrained(place) for place in (folder, tmp_path / "out"))
    text = "the slot forgets what it read"
    assert len(theirs(text).input_ids) > 3
    assert ours(text).input_ids == theirs(text).input_ids


def test_the_students_of_mistral_7b_and_llama_3_8b(tmp_path):
    """Of the real configs, without weights: the paper's student has 7.31B parameters."""
    mistral = dict(rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=1e4))
    llama = dict(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)
    llama |= dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))
    for theirs, size in ((MistralConfig(**mistral), 7.309e9), (LlamaConfig(**llama), 8.097e9)):
        teacher = Teacher(tmp_path, theirs, FAMILIES[theirs.model_type], {}, ())
        options = ConvertConfig(teacher="there", out="here", target="gsa")
        config = student_config(teacher, options)
        assert count_parameters(config).total == pytest.approx(size, rel=1e-4)
        with torch.device("meta"):
            own = sum(p.numel() for p in GSAForCausalLM(config).parameters())
            its = sum(p.numel() for p in AutoModelForCausalLM.from_config(theirs).parameters())
        gates, norms = 32 * 8 * 64 * 4096, 32 * 4096
        assert own == count_parameters(config).total == its + gates + norms
        # A sequence's state does not grow: 8 heads, 64 slots, 2 · 128 fp32 numbers, 32 layers.
        assert state_bytes(config, 10**6) == 32 * 8 * 64 * 256 * 4


@pytest.mark.parametrize("target", ["slots", "gsa"])
def test_a_slot_layer_is_its_formula_on_the_teachers_weights(target, save, tmp_path):
    """Of the teacher's q, k, v and output; gsa, the paper's: with swish around slots and a norm."""
    folder, model = save("llama")
    _, student = student_of(folder, tmp_path / "out", target=target, slots=3)
    theirs = model.model.layers[0].self_attn
    ours = student.model.layers[0].attn
    x = torch.randn(1, 9, 24)
    with torch.no_grad():
        q, k, v = theirs.q_proj(x), theirs.k_proj(x), theirs.v_proj(x)
        if target == "gsa":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k, v = q.view(1, 9, 4, 6), k.view(1, 9, 2, 6), v.view(9, 2, 6)
        if target == "slots":
            turn = (torch.arange(9)[None], model.config.rope_parameters["rope_theta"], None)
            q, k = rotate(q * 6**-0.5, *turn), rotate(k, *turn)
        q, k = q.view(9, 2, 2, 6), k[0]
        f = torch.sigmoid(ours.f_proj(x)).view(9, 2, 3) ** (1 / 8)
        memory = torch.zeros(2, 3, 12)
        read = []
        for t in range(9):
            kv = torch.cat([k[t], v[t]], -1)[:, None]
            memory = f[t, :, :, None] * memory + (1 - f[t])[..., None] * kv
            scores = torch.einsum("gmk,grk->grm", memory[..., :6], q[t])
            read.append(torch.einsum("grm,gmv->grv", scores.softmax(-1), memory[..., 6:]))
        y = torch.stack(read).flatten(1)
        if target == "gsa":
            y = F.silu(y)
            y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(ours(x).output[0], theirs.o_proj(y), rtol=1e-4, atol=1e-5)


def test_a_student_is_trained_on_text(save, tmp_path, capsys):
    """As typed: convert, shards by the teacher's tokenizer, train from the student's weights."""
    folder, _ = save("smollm2")
    text = tmp_path / "text.txt"
    text.write_text(
        "the slot forgets what the gate lets go, and remembers all that was read. " * 60
    )
    student, shards, run = (str(tmp_path / name) for name in ("student", "shards", "run"))
    assert main(["convert", str(folder), "--out", student, "--slots", "8", "--window", "4"]) == 0
    assert main(["data", "prepare", str(text), "--tokenizer", student, "--out", shards]) == 0
    command = ["train", "tiny", "--init", student, "--data", shards, "--out", run]
    assert main([*command, "--steps", "30", "--warmup", "2", "--lr", "0.003"]) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert losses[-1] < 0.7 * losses[0]
    trained = GSAForCausalLM.from_pretrained(run)
    assert trained.config.window_branch == 4 and trained.config.tie_word_embeddings
