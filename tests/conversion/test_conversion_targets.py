"""Teachers into GLA, RetNet and SUPRA: what is copied, what is new, and what is refused."""

import json

import pytest
import torch
from teachers import TEACHERS
from torch.nn import functional as F

from gsa.cli import main
from gsa.conversion import ConvertConfig, convert
from gsa.generation import Decoder, Sampling
from gsa.layers import LinearAttention
from gsa.layers.linear_attention import head_decays
from gsa.layers.rope import rotate
from gsa.model import GSAForCausalLM

NEW = {
    "gla": {"f_proj.weight", "f_out.weight", "f_out.bias", "g_norm.weight"},
    "retnet": {"g_norm.weight"},
    "supra": {"feature_map.layer.weight", "g_norm.weight"},
}


def student_of(folder, out, **options):
    made = convert(ConvertConfig(teacher=str(folder), out=str(out), **options))
    return made.report, GSAForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("llama 3", "retnet"),
        ("qwen2 with yarn", "gla"),  # biases, without rotation
        ("qwen2 with yarn", "supra"),
        ("qwen3", "gla"),  # norms of queries and keys
        ("qwen3", "retnet"),
    ],
)
def test_the_teachers_weights_are_there_and_the_rest_is_new(save, tmp_path, kind, target):
    folder, model = save(kind)
    report, student = student_of(folder, tmp_path / "out", target=target, keep_layers=(1,))
    new = {f"model.layers.{i}.attn.{part}" for i in (0, 2) for part in NEW[target]}
    assert set(report["new"]) == new
    assert report["layers"] == {"converted": [0, 2], "kept": [1]}
    assert report["check"]["student"][0] < 1e-5
    theirs, ours = model.state_dict(), student.state_dict()
    for name, source in report["copied"].items():
        assert torch.equal(ours[name], theirs[source]), name
    options = student.config.mixer_options(0)
    assert options.kv_heads == model.config.num_key_value_heads < options.num_heads
    rotates = options.rope_theta == model.config.rope_parameters["rope_theta"]
    assert rotates == (target != "gla") and not options.output_gate
    ids = torch.arange(12)[None]
    student(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())
    decoder = Decoder(student)
    written = list(decoder.write(decoder.prefill([5, 6, 7]), Sampling(greedy=True)))
    shown = student.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=len(written))
    assert shown[0, 3:].tolist() == written


def test_a_supra_layer_at_first_is_the_teachers_queries_and_keys_without_softmax(save, tmp_path):
    """relu of them (the learned map is the identity), rotated; decays by head; each head normed."""
    folder, model = save("smollm2")
    _, student = student_of(folder, tmp_path / "out", target="supra")
    layer, theirs = student.model.layers[0].attn, model.model.layers[0].self_attn
    x = torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9)[None]
    q, k = (F.linear(x, p.weight).unflatten(-1, (-1, 8)) for p in (theirs.q_proj, theirs.k_proj))
    q, k = (rotate(y.relu(), positions, 1e4, None)[0] for y in (q, k))
    v = F.linear(x, theirs.v_proj.weight)[0]
    distance = positions.T - positions
    decay = (head_decays(1, x.device, x.dtype) * distance).exp().tril()
    heads = [(q[:, h] @ k[:, 0].T * decay) @ v for h in range(3)]
    heads = [o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() for o in heads]
    expected = torch.cat(heads, -1) @ theirs.o_proj.weight.T
    torch.testing.assert_close(layer(x).output[0], expected, rtol=1e-4, atol=1e-5)


def test_gates_of_gla_can_be_spread(save, tmp_path):
    folder, _ = save()
    _, student = student_of(folder, tmp_path / "out", target="gla", gate_init="spread", tau=4)
    layer = student.model.layers[0].attn
    assert isinstance(layer, LinearAttention) and layer.options.gate_logit_normalizer == 4
    spread = torch.linspace(0, 6, layer.options.key_width)
    assert torch.equal(layer.f_out.bias.detach(), spread.repeat(layer.options.kv_heads))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (
            {"target": "mamba"},
            "target: expected one of slots, gsa, gla, retnet, supra",
        ),
        ({"target": "gla", "slots": 64}, "slots: expected none with target gla, got 64"),
        ({"target": "retnet", "tau": 8}, "tau: expected none with target retnet, got 8"),
        ({"target": "gla", "tau": 0}, "tau: expected a number > 0"),
        ({"target": "supra", "window": 4}, "window: expected none with target supra, got 4"),
        (
            {"target": "gla", "gate_init": "pooled_keys"},
            "gate_init: expected normal or spread with target gla",
        ),
        ({"target": "supra", "gate_init": "spread"}, "gate_init: expected normal with target"),
        (
            {"target": "gla", "model": {"use_short_conv": True}},
            "use_short_conv: expected False with mixer 'gla'",
        ),
    ],
)
def test_what_a_target_has_not_is_refused_before_anything_is_written(save, tmp_path, options, part):
    folder, _ = save()
    with pytest.raises(ValueError) as raised:
        convert(ConvertConfig(teacher=str(folder), out=str(tmp_path / "out"), **options))
    assert part in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_the_command(save, tmp_path, capsys):
    folder, _ = save(TEACHERS["mistral"]())
    out = tmp_path / "out"
    arguments = ["convert", str(folder), "--out", str(out), "--target", "gla"]
    assert main([*arguments, "--model.output_gate", "true", "--model.gate_low_rank", "4"]) == 0
    assert "3 layers of gla, 0 kept" in capsys.readouterr().out
    said = json.loads((out / "conversion.json").read_text())
    assert said["options"]["target"] == "gla" and said["options"]["tau"] == 16
    assert said["options"]["feature_map"] == "relu" and said["options"]["slots"] is None
    layer = GSAForCausalLM.from_pretrained(out).model.layers[0].attn
    assert layer.options.output_gate and layer.f_proj.weight.shape == (4, 24)
