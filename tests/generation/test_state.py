"""A state is a file: what goes on from it, in another process too, goes on as without it."""

import json
from dataclasses import replace

import pytest
import torch
from forks import Forked
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, build_tiny, save_without_room, write_on

from gsa.generation import Decoder, ModelState, Sampling
from gsa.generation.state import checksum, fingerprint
from gsa.generation.text import load
from gsa.model import GSAForCausalLM

SAMPLING = Sampling(temperature=1.3, repetition_penalty=1.2, max_new_tokens=20, seed=5)


def test_prefill_save_load_in_another_process_continue(tmp_path, prompts):
    expected = {}
    for name, variant in VARIANTS.items():
        decoder = Decoder(build_tiny(**variant))
        state = decoder.prefill(prompts(9)[8] * 3)
        state.save(tmp_path / f"{name}.safetensors")
        expected[name] = list(decoder.write(state, SAMPLING))
    texts, errors = Forked(write_on, tmp_path, SAMPLING).communicate()
    assert json.loads(texts) == expected, errors
    assert len({token for text in expected.values() for token in text}) > 10


def test_a_state_holds_what_it_was(model, prompts, tmp_path):
    decoder = Decoder(model)
    for prompt in ([5], prompts(3)[2]):
        state = decoder.prefill(prompt)
        state.save(tmp_path / "deep" / "s.safetensors")
        found = ModelState.load(tmp_path / "deep" / "s.safetensors")
        assert (found.tokens, found.last) == (len(prompt), prompt[-1])
        assert found.fingerprint == decoder.fingerprint
        assert found.met.nonzero()[:, 0].tolist() == sorted(set(prompt))
        assert found.tensors.keys() == state.tensors.keys()
        for name, tensor in state.tensors.items():
            assert torch.equal(found.tensors[name], tensor)
        text = list(decoder.write(state, SAMPLING))
        assert list(decoder.write(found, SAMPLING)) == text
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["s.safetensors"]


def test_a_fork_and_what_became_of_the_other(prompts):
    decoder = Decoder(build_tiny())
    state = decoder.prefill(prompts(1)[0])
    text = list(decoder.write(state, SAMPLING))
    fork = state.fork()
    decoder.prefill([7, 8, 9], state)
    longer = decoder.prefill([7, 8, 9], fork)
    assert list(decoder.write(fork, SAMPLING)) == list(decoder.write(state, SAMPLING)) == text
    assert longer.tokens == state.tokens + 3
    whole = decoder.prefill([*prompts(1)[0], 7, 8, 9])
    assert list(decoder.write(longer, SAMPLING)) == list(decoder.write(whole, SAMPLING))


def test_its_size_does_not_depend_on_the_text(tmp_path):
    decoder = Decoder(build_tiny(gate="abc", use_short_conv=True))
    sizes = []
    for tokens in (40, 1000):
        decoder.prefill([3, 4, 5, 6] * (tokens // 4)).save(tmp_path / "s")
        sizes.append((tmp_path / "s").stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 20  # digits of the count


def test_a_state_of_another_model_is_refused(prompts):
    prompt = prompts(1)[0]
    state = Decoder(build_tiny()).prefill(prompt)
    other = build_tiny()
    with torch.no_grad():
        other.model.layers[1].attn.f_proj.weight[3, 5] += 1e-9
    for model in (other, build_tiny(scale=0.5), build_tiny().float(), build_tiny(seed=1)):
        decoder = Decoder(model)
        for use in (lambda d: d.start(state, SAMPLING), lambda d: d.prefill([3], state)):
            with pytest.raises(ValueError, match="state: expected one of this model"):
                use(decoder)
    Decoder(build_tiny(max_position_embeddings=77)).prefill(prompt, state)


def test_a_fingerprint_survives_saving(folder, tmp_path):
    model, _ = load(folder)
    model.save_pretrained(tmp_path)
    again = GSAForCausalLM.from_pretrained(tmp_path)
    assert fingerprint(again) == fingerprint(model) != fingerprint(build_tiny())


def test_a_checksum_sees_every_bit_and_the_order():
    values = torch.arange(1003, dtype=torch.float32)
    sums = {checksum(values), checksum(values.flip(0)), checksum(values[:1002])}
    for place in (0, 500, 1001, 1002):
        changed = values.clone()
        changed.view(torch.int32)[place] ^= 1
        sums.add(checksum(changed))
    assert len(sums) == 7
    padded = torch.cat([values[:1], values])[1:]  # begins in the middle of eight bytes
    assert checksum(padded) == checksum(values)
    assert checksum(torch.zeros(0)) == 0


def test_files_that_are_no_state_are_explained(tmp_path, prompts):
    decoder = Decoder(build_tiny())
    path = tmp_path / "s.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file; gsa prefill writes one"):
        ModelState.load(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"expected a model's state .* 'another safetensors"):
        ModelState.load(path)
    state = decoder.prefill(prompts(3)[2])
    path.unlink()
    state.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot be read .* damaged"):
        ModelState.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="not a whole state"):
        ModelState.load(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for found, said in (
        ({n: t for n, t in tensors.items() if n != "layers.1.memory"}, metadata),
        (tensors | {"layers.7.memory": torch.ones(1)}, metadata),
        (tensors, metadata | {"tokens": "9"}),
        (tensors, metadata | {"format": "gated-slots state 1"}),
    ):
        save_file(found, path, said)
        with pytest.raises(ValueError, match=r"not a whole state|got 'gated-slots state 1'"):
            ModelState.load(path)


def test_a_full_disk_leaves_the_earlier_state(tmp_path, prompts):
    state = Decoder(build_tiny()).prefill(prompts(1)[0])
    state.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    said, errors = Forked(save_without_room, state, tmp_path / "s").communicate()
    assert "s could not be written" in said, errors
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_a_state_of_another_layout_is_refused(prompts):
    decoder = Decoder(build_tiny(gate="abc"))
    state = decoder.prefill(prompts(1)[0])
    memory = state.tensors["layers.1.memory"]
    less = {name: t for name, t in state.tensors.items() if name != "layers.1.memory"}
    for tensors, message in (
        (less | {"layers.1.memory": memory[:, :2]}, r"layers\.1\.memory of shape \[1, 4, 5, 8\]"),
        (less | {"layers.1.memory": memory.float()}, r"layers\.1\.memory .* and torch\.float64"),
        (less, r"expected layers\.1\.memory .* got None"),
        ({}, r"expected layers\.0\.memory .* got None"),
        (dict(state.tensors) | {"layers.7.memory": memory}, r"no tensor 'layers\.7\.memory'"),
    ):
        other = replace(state, tensors=tensors)
        for use in (
            lambda s=other: decoder.start(s, SAMPLING),
            lambda s=other: decoder.prefill([3], s),
        ):
            with pytest.raises(ValueError, match=message):
                use()
