"""Files to documents: what is read, in what order, and every complaint with its place."""

import json
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from gsa.data import PrepareConfig, prepare


def documents(shards):
    """Each document's text, its end token left off."""
    return [bytes(shards.document(i)[:-1].tolist()).decode() for i in range(shards.num_documents)]


@pytest.fixture
def run(tmp_path):
    """Prepares the given inputs (paths below tmp_path)."""

    def prepare_here(*names, **options):
        inputs = tuple(str(tmp_path / name) for name in names)
        return prepare(PrepareConfig(inputs=inputs, out=str(tmp_path / "shards"), **options))

    return prepare_here


def write_parquet(path, **columns):
    parquet.write_table(pa.table(columns), path)


def test_a_folder_is_read_sorted_and_recursive(tmp_path, run):
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/b.txt").write_text("second")
    (tmp_path / "in/sub/a.txt").write_text("last")
    (tmp_path / "in/a.jsonl").write_text('{"text": "first"}\n\n{"text": ""}\n{"text": "also"}\n')
    write_parquet(tmp_path / "in/c.parquet", text=["third", None, "fourth"], other=[1, 2, 3])
    (tmp_path / "in/.hidden.txt").write_text("not read")
    (tmp_path / "in/notes.md").write_text("not read")
    shards = run("in")
    assert documents(shards) == ["first", "also", "second", "third", "fourth", "last"]
    names = [shards.document_name(i) for i in range(6)]
    ours = ["a.jsonl#1", "a.jsonl#2", "b.txt", "c.parquet#1", "c.parquet#2", "sub/a.txt"]
    assert names == ours
    assert shards.skipped_empty == 2
    assert shards.sources[0] == {"name": "a.jsonl", "documents": 2, "tokens": 11}


def test_text_is_kept_byte_for_byte_but_the_mark(tmp_path, run):
    # Longer than one read, so that characters lie across the blocks.
    body = "a" + "é😀\r\n  " * 200_000
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + body.encode())
    assert documents(run("a.txt")) == [body]


def test_jsonl_key_and_escapes(tmp_path, run):
    rows = [{"body": "nul \0, \u2028, 😀"}, {"body": "<|endoftext|>", "text": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert documents(run("a.jsonl", text_key="body")) == [row["body"] for row in rows]


def test_many_parquet_batches(tmp_path, run):
    texts = [f"row {i}" for i in range(1000)]
    write_parquet(tmp_path / "a.parquet", text=texts)
    assert documents(run("a.parquet")) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt: expected text, got none"),
        ("mark.txt", b"\xef\xbb\xbf", r"mark\.txt: expected text, got none"),
        ("empty.jsonl", b"\n\n", r"empty\.jsonl: expected text, got none"),
        ("nul.txt", b"abc\0def", r"nul\.txt: .*a binary file \(NUL byte at byte 3\)"),
        ("latin.txt", b"caf\xe9 au lait", r"latin\.txt: expected UTF-8 .* at byte 3;"),
        ("cut.txt", "abé".encode()[:-1], r"cut\.txt: expected UTF-8 .* at byte 2;"),
        ("far.txt", b"a" * (1 << 20) + b"b\xff", r"far\.txt: .* at byte 1048577;"),
        ("split.txt", b"a" * ((1 << 20) - 1) + b"\xe2\x28", r"split\.txt: .* at byte 1048575;"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad\.jsonl, line 2: .* broken JSON"),
        ("latin.jsonl", b'{"text": "a"}\n\n"\xe9"\n', r"latin\.jsonl, line 3: .* at byte 1;"),
        ("list.jsonl", b"[1]\n", r"list\.jsonl, line 1: expected a JSON object, got list"),
        (
            "key.jsonl",
            b'{"body": "x", "id": 1}\n',
            r"key\.jsonl, line 1: .*'text', got keys 'body'",
        ),
        ("kind.jsonl", b'{"text": 3}\n', r"kind\.jsonl, line 1: expected text in 'text', got int"),
        ("half.jsonl", b'{"text": "a\\ud800"}\n', r"half\.jsonl, line 1: .* surrogate .* 1"),
        ("deep.jsonl", b"[" * 100_000, r"deep\.jsonl, line 1: .* broken JSON"),
        ("no.parquet", b"PAR1 or so", r"no\.parquet: expected a parquet file"),
        ("book.pdf", b"text", r"inputs: expected \.txt, .*got .*book\.pdf; rename"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, run, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_parquet_without_the_column_lists_the_columns(tmp_path, run):
    write_parquet(tmp_path / "a.parquet", body=["x"], id=[1])
    with pytest.raises(ValueError, match=r"a\.parquet: .*'text', got columns 'body', 'id'"):
        run("a.parquet")


def test_damaged_parquet_is_named(tmp_path, run):
    write_parquet(tmp_path / "a.parquet", text=["beta " * 50, "gamma"])
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[:120] = data[:4] + bytes(116)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet: damaged after row 0"):
        run("a.parquet")


def test_parquet_rows_of_another_kind_are_named(tmp_path, run):
    write_parquet(tmp_path / "a.parquet", text=[1, 2])
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: expected text in 'text', got int"):
        run("a.parquet")


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, run, monkeypatch):
    write_parquet(tmp_path / "a.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "gated-slots\[parquet\]"'):
        run("a.parquet")


def test_missing_and_doubled_inputs(tmp_path, run):
    with pytest.raises(FileNotFoundError, match=r"inputs: .*absent\.txt does not exist"):
        run("absent.txt")
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"no \.txt, \.jsonl, \.parquet file in the folder"):
        run("in")
    (tmp_path / "in/a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"a\.txt is meant twice"):
        run("in", "in/a.txt")
