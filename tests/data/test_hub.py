"""Hugging Face datasets as inputs: real local ones, whole and as streams."""

import json
import sys

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pytest
from pyarrow import parquet

from gsa.data import PrepareConfig, TokenShards, prepare
from gsa.data.hub import Address, parse_address

TEXTS = [
    "first, <|endoftext|> is text",
    "",
    None,
    "né 😀\n\0",
    *(f"row {i}" * i for i in range(200)),
]
KEPT = [text for text in TEXTS if text]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of `datasets`, kept out of the home folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def run(tmp_path):
    """run("hf:books", ...): shards of inputs below tmp_path."""

    def prepare_here(*inputs, **options):
        given = tuple(name.replace("hf:", f"hf:{tmp_path}/") for name in inputs)
        out = str(tmp_path / options.pop("out", "shards"))
        return prepare(PrepareConfig(inputs=given, out=out, overwrite=True, **options))

    return prepare_here


def documents(shards):
    """Each document's text, its end token left off."""
    return [bytes(shards.document(i)[:-1].tolist()).decode() for i in range(shards.num_documents)]


def write(folder, kind):
    """A folder that holds TEXTS in the column `body`, as a dataset of that kind."""
    columns = {"id": list(range(len(TEXTS))), "body": TEXTS}
    if kind == "saved":
        datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    elif kind == "saved splits":
        other = datasets.Dataset.from_dict({"id": [0], "body": ["other"]})
        splits = {"train": datasets.Dataset.from_dict(columns), "test": other}
        datasets.DatasetDict(splits).save_to_disk(str(folder))
    elif kind == "jsonl":
        folder.mkdir()
        rows = [json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(TEXTS)]
        (folder / "part-0.jsonl").write_text("".join(rows[:90]))
        (folder / "part-1.jsonl").write_text("".join(rows[90:]))
    else:
        folder.mkdir()
        table = pa.table(columns)
        parquet.write_table(table.slice(0, 90), folder / "part-0.parquet")
        parquet.write_table(table.slice(90), folder / "part-1.parquet")


@pytest.mark.parametrize("kind", ["saved", "saved splits", "jsonl", "parquet"])
def test_whole_and_as_a_stream_the_shards_are_the_same(tmp_path, run, kind, capfd):
    write(tmp_path / "books", kind)
    capfd.readouterr()  # save_to_disk has a progress bar
    whole = run("hf:books", text_key="body", out="whole")
    stream = run("hf:books", text_key="body", out="stream", streaming=True)
    assert capfd.readouterr() == ("", ""), "no progress without a terminal"
    assert documents(whole) == KEPT and whole.skipped_empty == len(TEXTS) - len(KEPT)
    assert whole.fingerprint == stream.fingerprint
    for name in whole.files:
        assert (whole.folder / name).read_bytes() == (stream.folder / name).read_bytes()
    name = "books" if kind == "saved" else "books@train"
    assert [source["name"] for source in whole.sources] == [name]
    assert whole.document_name(1) == f"{name}#2"
    assert str(tmp_path) not in (whole.folder / "index.json").read_text()


def test_datasets_and_files_in_the_order_given(tmp_path, run):
    write(tmp_path / "books", "saved splits")
    (tmp_path / "a.txt").write_text("a file")
    shards = run("hf:books@test", f"{tmp_path}/a.txt", "hf:books", text_key="body")
    assert documents(shards) == ["other", "a file", *KEPT]
    assert [source["name"] for source in shards.sources] == ["books@test", "a.txt", "books@train"]


@pytest.mark.parametrize("streaming", [False, True])
def test_mistakes_are_named(tmp_path, run, streaming):
    write(tmp_path / "saved", "saved")
    write(tmp_path / "splits", "saved splits")
    write(tmp_path / "jsonl", "jsonl")
    (tmp_path / "empty").mkdir()
    for given, message in (
        ("hf:saved", r"hf:.*/saved: expected the column 'text', got columns 'id', 'body'; set te"),
        ("hf:jsonl", r"hf:.*/jsonl: expected the column 'text', got columns 'id', 'body'; set te"),
        (
            "hf:splits@valid",
            r"hf:.*@valid could not be opened: expected one of .* train, test, got",
        ),
        ("hf:saved@test", r"hf:.*@test could not be opened: it holds one dataset .*, not test"),
        ("hf:jsonl@test", r"hf:.*@test could not be opened: .*\['train'\]"),
        ("hf:empty", r"hf:.*/empty could not be opened: .* doesn't contain any data files"),
    ):
        with pytest.raises(ValueError, match=r"inputs: " + message):
            run(given, streaming=streaming)
    with pytest.raises(ValueError, match=r"hf:.*/saved, row 1: expected text in 'id', got int"):
        run("hf:saved", text_key="id", streaming=streaming)
    with pytest.raises(ValueError, match=r"hf:.*/splits@train is meant twice"):
        run("hf:splits", "hf:splits@train", text_key="body", streaming=streaming)
    with pytest.raises(FileNotFoundError, match=r"hf:.*/absent: no such folder /"):
        run("hf:absent", streaming=streaming)
    assert not (tmp_path / "shards").exists()
    with pytest.raises(ValueError, match="out: expected a folder apart from the inputs"):
        run("hf:splits@train", text_key="body", out="splits/shards", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_data_leaves_the_earlier_shards(tmp_path, run, streaming):
    write(tmp_path / "books", "jsonl")
    before = run("hf:books", text_key="body").fingerprint
    (tmp_path / "books/part-1.jsonl").write_text('{"id": 0, "body": "x"}\n{"id": 1, "bo')
    place = "read on after row 64" if streaming else "opened"
    with pytest.raises(ValueError, match=rf"hf:.*/books could not be {place}: .*JSON"):
        run("hf:books", text_key="body", streaming=streaming)
    left = TokenShards(tmp_path / "shards")
    left.verify()
    assert left.fingerprint == before


def test_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "odd@name").mkdir()
    for given, address, name in (
        ("hf:wikitext", Address(None, "wikitext", None, "train"), "wikitext@train"),
        ("hf:allenai/c4", Address(None, "allenai/c4", None, "train"), "allenai/c4@train"),
        ("hf:allenai/c4/en@x", Address(None, "allenai/c4", "en", "x"), "allenai/c4/en@x"),
    ):
        assert parse_address(given) == address and str(address) == name
    here, odd = parse_address("hf:here@test"), parse_address("hf:odd@name")
    assert (str(here.folder), here.split, str(here)) == ("here", "test", "here@test")
    assert (str(odd.folder), odd.split) == ("odd@name", None)
    for given in ("hf:", "hf:@train", "hf:a/b@"):
        with pytest.raises(ValueError, match="inputs: expected hf:OWNER/NAME, "):
            parse_address(given)
    for given in ("hf:/a", "hf:./a", "hf:a/b/c/d", "hf:../a/b@train"):
        with pytest.raises(FileNotFoundError, match=rf"inputs: {given}: no such folder"):
            parse_address(given)


def test_the_hub_out_of_reach_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"inputs: hf:nobody/nothing could not be opened: .*nobody"
    ):
        prepare(PrepareConfig(inputs=("hf:nobody/nothing",), out=str(tmp_path / "x")))


def test_streaming_is_for_datasets():
    with pytest.raises(ValueError, match="streaming: expected an hf: input"):
        PrepareConfig(inputs=("books",), out="x", streaming=True)


def test_without_datasets_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'gated-slots\[data\]'"):
        prepare(PrepareConfig(inputs=("hf:a/b",), out=str(tmp_path / "x")))
