"""A shard folder appears whole or not at all, and what was there before stays."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from forks import Forked, gsa
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gsa.data import PrepareConfig, TokenShards, prepare, save_byte_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("To be, or not to be, that is the question. " * 40)
    (folder / "b.jsonl").write_text('{"text": "the <|endoftext|> is text"}\n{"text": "to be"}\n')
    return folder


def config(text, out, **options):
    return PrepareConfig(inputs=(str(text),), out=str(out), **options)


def script(text, out):
    """Python that prepares `text` with overwrite, in a process of its own."""
    return [
        sys.executable,
        "-c",
        "from gsa.data import PrepareConfig, prepare\n"
        f"prepare(PrepareConfig(inputs=({str(text)!r},), out={str(out)!r}, overwrite=True))",
    ]


@pytest.fixture
def word_tokenizer(tmp_path):
    """A small BPE tokenizer in a folder, with an added token above its base vocabulary."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["To be, or not to be, that is the question"] * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.add_special_tokens({"eos_token": "</s>"})
    fast.save_pretrained(tmp_path / "words")
    return fast, tmp_path / "words"


def test_the_same_text_gives_the_same_bytes(text, tmp_path):
    first, second = (prepare(config(text, tmp_path / name)) for name in ("one", "two"))
    assert first.fingerprint == second.fingerprint
    for name in first.files:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    first.verify()
    assert str(tmp_path) not in (first.folder / "index.json").read_text()


def test_hugging_face_tokenizer(text, tmp_path, word_tokenizer):
    fast, folder = word_tokenizer
    shards = prepare(config(text, tmp_path / "out", tokenizer=str(folder)))
    shards.verify()
    assert shards.vocab_size == len(fast) == fast.vocab_size + 1
    assert shards.eos_id == fast.eos_token_id == len(fast) - 1
    expected = [*fast.encode("to be", add_special_tokens=False), shards.eos_id]
    assert shards.document(2).tolist() == expected
    copied = shards.load_tokenizer()
    assert copied.decode(shards.document(0)[:6].tolist()) == fast.decode(shards.document(0)[:6])
    assert len(copied) == len(fast)


def test_the_byte_tokenizer_by_name_and_by_folder_agree(text, tmp_path):
    save_byte_tokenizer(tmp_path / "bytes")
    by_name = prepare(config(text, tmp_path / "one"))
    by_folder = prepare(config(text, tmp_path / "two", tokenizer=str(tmp_path / "bytes")))
    assert np.array_equal(by_name.tokens, by_folder.tokens)
    assert np.array_equal(by_name.document_starts, by_folder.document_starts)
    # Text that spells the end token is text: three documents, three end tokens.
    assert (np.asarray(by_folder.tokens) == by_folder.eos_id).sum() == 3


def test_tokens_wider_than_sixteen_bits(text, tmp_path):
    words = {f"word{i}": i for i in range((1 << 16) + 1)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word0", eos_token="word1")
    fast.save_pretrained(tmp_path / "words")
    (text / "a.txt").write_text("word65536 word65535")
    shards = prepare(config(text, tmp_path / "out", tokenizer=str(tmp_path / "words")))
    assert shards.tokens.dtype == np.dtype("<u4")
    assert shards.document(0).tolist() == [1 << 16, (1 << 16) - 1, shards.eos_id]


def test_a_tokenizer_without_eos_or_without_files_is_refused(text, tmp_path, word_tokenizer):
    fast, folder = word_tokenizer
    fast.eos_token = None
    fast.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"tokenizer: .* has no eos_token"):
        prepare(config(text, tmp_path / "out", tokenizer=str(folder)))
    with pytest.raises(
        FileNotFoundError, match=r"expected 'bytes', .* or the folder .*, got absent"
    ):
        prepare(config(text, tmp_path / "out", tokenizer="absent"))
    with pytest.raises(ValueError, match="no tokenizer could be loaded from"):
        prepare(config(text, tmp_path / "out", tokenizer=str(text)))
    assert not (tmp_path / "out").exists()


def test_remote_code_is_never_run(text, tmp_path):
    folder = tmp_path / "remote"
    save_byte_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}, "tokenizer_class": "Evil"}'
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    with pytest.raises(ValueError, match="tokenizer: "):
        prepare(config(text, tmp_path / "out", tokenizer=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_only_complete_shards_are_replaced_and_only_when_asked(text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first = prepare(config(text, out))  # an empty folder is free
    with pytest.raises(FileExistsError, match="already holds shards; pass overwrite"):
        prepare(config(text, out))
    (text / "a.txt").write_text("other")
    second = prepare(config(text, out, overwrite=True))
    assert second.fingerprint != first.fingerprint
    assert second.num_documents == 3
    (out / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="also holds notes"):
        prepare(config(text, out, overwrite=True))
    assert (out / "notes").read_text() == "mine"
    (out / "notes").unlink()
    (out / "index.json").unlink()
    with pytest.raises(FileExistsError, match="is not a complete shard folder"):
        prepare(config(text, out, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text"]


def test_other_folders_and_files_are_never_touched(text, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="not a complete shard folder"):
        prepare(config(text, tmp_path / "work", overwrite=True))
    with pytest.raises(FileExistsError):
        prepare(config(text, tmp_path / "work/thesis.tex", overwrite=True))
    assert (tmp_path / "work/thesis.tex").read_text() == "years"
    for out in (text, text / "shards", tmp_path):
        with pytest.raises(ValueError, match="out: expected a folder apart from the inputs"):
            prepare(config(text, out, overwrite=True))


def test_full_disk_keeps_the_earlier_shards(text, tmp_path):
    out = tmp_path / "out"
    before = prepare(config(text, out))
    (text / "a.txt").write_text("x" * 300_000)
    # Files may grow to 100 KB: enough for the tokenizer, not for 600 KB of tokens.
    command = ["data", "prepare", str(text), "--out", str(out), "--overwrite"]
    preparing = Forked(gsa, command, 100_000)
    _, errors = preparing.communicate()
    assert preparing.returncode == 2
    assert f"cannot write {out}: File too large; it is left as it was" in errors
    assert TokenShards(out).fingerprint == before.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text"]
    out.rename(tmp_path / "aside")
    assert Forked(gsa, command, 100_000).wait() == 2
    assert not out.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interruption_leaves_nothing_that_looks_complete(text, tmp_path, number):
    out = tmp_path / "out"
    before = prepare(config(text, out))
    pipe = text / "pipe.txt"
    os.mkfifo(pipe)  # a text that never ends: the process waits in the middle of reading
    held = os.open(pipe, os.O_RDWR)
    # Tests that run in the background of a shell ignore SIGINT, and so would their children.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command, quiet = script(text, out), subprocess.DEVNULL
    child = subprocess.Popen(command, cwd=ROOT, stderr=quiet, preexec_fn=heeding)
    folder = tmp_path / f".out.partial-{child.pid}"
    while child.poll() is None and not (folder / "documents.bin").exists():
        time.sleep(0.02)
    child.send_signal(number)
    assert child.wait(timeout=60) == -number
    os.close(held)
    assert TokenShards(out).fingerprint == before.fingerprint
    left = [path for path in tmp_path.iterdir() if path.name not in ("out", "text")]
    if number == signal.SIGINT:
        assert left == []
    else:
        assert left == [folder]
        with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
            TokenShards(folder)


def test_a_crash_between_the_two_renames_is_repaired(text, tmp_path):
    out = tmp_path / "out"
    before = prepare(config(text, out))
    out.rename(tmp_path / ".out.previous")
    with pytest.raises(FileExistsError, match="already holds shards"):
        prepare(config(text, out))
    assert TokenShards(out).fingerprint == before.fingerprint


def test_no_noise_without_a_terminal(text, tmp_path, capfd):
    prepare(config(text, tmp_path / "out"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": (), "out": "o"}, "inputs: expected one or more paths"),
        ({"inputs": "a.txt", "out": "o"}, "inputs: expected one or more paths"),
        ({"inputs": ("a",), "out": ""}, "out: expected a non-empty string"),
        ({"inputs": ("a",), "out": "o", "text_key": ""}, "text_key: expected"),
    ],
)
def test_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**options)
