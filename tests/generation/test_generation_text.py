import shutil

import pytest
import torch

from gsa.data import save_byte_tokenizer
from gsa.generation import GenerateConfig
from gsa.generation.text import TextStream, generate_text, generate_tokens, load, pick_token
from gsa.model import GSAConfig, GSAForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random byte-level model with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = GSAConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_heads=2, num_slots=8,
        intermediate_size=64, initializer_range=0.3, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    GSAForCausalLM(config).save_pretrained(path)
    save_byte_tokenizer(path)
    return path


def test_greedy_is_transformers_generate(folder):
    model, tokenizer = load(folder)
    prompt = tokenizer("The slot").input_ids
    config = GenerateConfig(model=str(folder), prompt="The slot", max_new_tokens=60, greedy=True)
    ours = list(generate_tokens(model, prompt, config))
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)
    assert ours == theirs[0, len(prompt) :].tolist()
    assert "".join(generate_text(config)) == tokenizer.decode(ours)


def test_the_end_of_document_stops(folder):
    model, tokenizer = load(folder)
    prompt = tokenizer("The slot").input_ids
    config = GenerateConfig(model=str(folder), prompt="x", max_new_tokens=20, greedy=True)
    tokens = list(generate_tokens(model, prompt, config))
    end = tokens[7]
    model.generation_config.eos_token_id = [3, end]
    assert list(generate_tokens(model, prompt, config)) == tokens[: tokens.index(end)]


def picks(probs, count=4000, **options):
    config = GenerateConfig(model="m", prompt="p", **{"temperature": 1.0, **options})
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor(probs).log()
    drawn = [int(pick_token(logits, config, generator)) for _ in range(count)]
    return [drawn.count(i) / count for i in range(len(probs))]


def test_sampling_follows_the_probabilities():
    assert picks([0.5, 0.3, 0.2]) == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    assert picks([0.5, 0.3, 0.2], temperature=0.5) == pytest.approx(
        [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38], abs=0.03
    )


def test_top_k_and_top_p_cut_the_tail():
    assert picks([0.2, 0.5, 0.3], top_k=2) == pytest.approx([0.0, 0.625, 0.375], abs=0.03)
    assert picks([0.2, 0.5, 0.3], top_p=0.6) == pytest.approx([0.0, 0.625, 0.375], abs=0.03)
    assert picks([0.2, 0.5, 0.3], top_p=0.4, count=50) == [0.0, 1.0, 0.0]
    assert picks([0.2, 0.5, 0.3], top_k=1, count=50) == [0.0, 1.0, 0.0]


def test_characters_come_whole(folder):
    _, tokenizer = load(folder)
    text = "é€𝄞 plain"
    stream = TextStream(tokenizer, tokenizer("ab").input_ids)
    pieces = [stream.add(token) for token in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.end() == ""


def test_bytes_that_are_no_text_are_shown_as_such(folder):
    _, tokenizer = load(folder)
    tokens = [0xFF, 0xC3, *b"ok", 0xE2, 0x82]
    stream = TextStream(tokenizer, tokenizer("a").input_ids)
    pieces = [stream.add(token) for token in tokens] + [stream.end()]
    assert "".join(pieces) == bytes(tokens).decode(errors="replace")


def test_folders_that_are_no_model_are_explained(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="got 'llama'"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="expected a JSON object"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gsa"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="never loaded"):
        load(tmp_path)


def test_damaged_and_partial_models_are_explained(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="the weights cannot be read"):
        load(broken)
    half = tmp_path / "step-00000003.incomplete"
    shutil.copytree(folder, half)
    with pytest.raises(ValueError, match="half written"):
        load(half)
    mute = tmp_path / "mute"
    shutil.copytree(folder, mute)
    for path in mute.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        load(mute)


def test_an_empty_prompt_is_refused(folder):
    with pytest.raises(ValueError, match="prompt: expected some text"):
        next(generate_text(GenerateConfig(model=str(folder), prompt="")))


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("model", "")],
)
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        GenerateConfig(**{"model": "m", "prompt": "p", field: value})
