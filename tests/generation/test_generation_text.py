import shutil

import pytest
import torch

from gsa.generation import Decoder, GenerateConfig, ModelState
from gsa.generation.config import PrefillConfig
from gsa.generation.text import TextStream, generate_text, load, prefill_file


def config(folder, **options):
    return GenerateConfig(**{"model": str(folder), "prompt": "The slot", "greedy": True} | options)


def test_greedy_is_transformers_generate(folder):
    model, tokenizer = load(folder)
    prompt = tokenizer("The slot", return_tensors="pt").input_ids
    theirs = model.generate(prompt, max_new_tokens=60, do_sample=False)
    text = tokenizer.decode(theirs[0, prompt.shape[1] :], skip_special_tokens=True)
    assert "".join(generate_text(config(folder, max_new_tokens=60))) == text


def test_the_end_of_document_is_no_text(folder, tmp_path):
    """The model's own end token, wherever it comes: the text stops before it."""
    model, tokenizer = load(folder)
    prompt = tokenizer("The slot", return_tensors="pt").input_ids
    tokens = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    end = int(tokens[7])
    model.generation_config.eos_token_id = [3, end]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = tokens.tolist().index(end)
    text = "".join(generate_text(config(tmp_path, max_new_tokens=20)))
    assert text == tokenizer.decode(tokens[:before])


def test_dtype_is_that_of_the_weights_unless_asked_otherwise(folder):
    assert load(folder)[0].dtype == torch.float32
    assert load(folder, "bf16")[0].dtype == torch.bfloat16
    assert len("".join(generate_text(config(folder, dtype="bf16", max_new_tokens=5)))) > 0


def test_a_prompt_after_a_state_is_the_whole_text(folder, tmp_path):
    model, tokenizer = load(folder)
    decoder = Decoder(model)
    decoder.prefill(tokenizer("The slot").input_ids).save(tmp_path / "slot.safetensors")
    at = str(tmp_path / "slot.safetensors")
    for prompt in ("", " forgets"):
        whole = "".join(generate_text(config(folder, prompt="The slot" + prompt)))
        assert "".join(generate_text(config(folder, prompt=prompt, state=at))) == whole
    assert ModelState.load(at).tokens == 8


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


def test_much_that_is_no_text_is_not_read_again_and_again(folder):
    """Given out on the way, and a character in its midst is still whole."""
    _, tokenizer = load(folder)
    tokens = [*[0xFF] * 95, *"𝄞".encode(), *[0x80, 0xC3] * 60, *"é€ ok".encode()]
    longest, decode = 0, tokenizer.decode

    class Watched:
        def decode(self, ids, **options):
            nonlocal longest
            longest = max(longest, len(ids))
            return decode(ids, **options)

    stream = TextStream(Watched(), tokenizer("a").input_ids)
    pieces = [stream.add(token) for token in tokens] + [stream.end()]
    assert "".join(pieces) == bytes(tokens).decode(errors="replace")
    assert longest <= 48 and sum(map(bool, pieces)) > 5


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


def test_an_empty_prompt_and_a_device_without_numbers_are_refused(folder):
    with pytest.raises(ValueError, match="prompt: expected some text"):
        next(generate_text(GenerateConfig(model=str(folder), prompt="")))
    with pytest.raises(ValueError, match="device: 'meta' cannot be used here"):
        next(generate_text(config(folder, device="meta")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0), ("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("model", ""),
        ("repetition_penalty", 0.0), ("seed", 2**63), ("top_k", 2**63), ("max_new_tokens", 2**63),
        ("temperature", 1e300), ("temperature", 1e-40), ("repetition_penalty", 1e300),
        ("temperature", float("nan")), ("prompt", "caf\udce9"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        GenerateConfig(**{"model": "m", "prompt": "p", field: value})


def test_a_state_replaces_nothing_but_a_state(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    book, weights = tmp_path / "book.txt", model / "model.safetensors"
    book.write_text("The slot")
    before = [path.read_bytes() for path in (book, weights)]
    for path in (book, weights):
        with pytest.raises(FileExistsError, match="exists and is no model's state; choose another"):
            prefill_file(PrefillConfig(model=str(model), text=str(book), state=str(path)))
    with pytest.raises(ValueError, match="state: expected a file to write, got the folder"):
        prefill_file(PrefillConfig(model=str(model), text=str(book), state=str(tmp_path)))
    assert [path.read_bytes() for path in (book, weights)] == before
    place = PrefillConfig(model=str(model), text=str(book), state=str(tmp_path / "s.safetensors"))
    assert prefill_file(place) and prefill_file(place)
