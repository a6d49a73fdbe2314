"""Packages, folders and books to a corpus: real .deb files, made here, in; checked jsonl out."""

import gzip
import io
import itertools
import json
import lzma
import random
import re
import tarfile

import pytest

from gsa.cli import main
from gsa.data import PrepareConfig, prepare
from gsa.data.corpus import CorpusConfig, build_corpus, builder

SMALL = re.findall(r"\w+", "the of and to in is that for with as by from not which was on at they")
SYLLABLES = re.findall(r"\w+", "ba ren lo tis mar ke dun vel so gar pim nor ta fel wi")


def story(number: int, paragraphs: int = 5) -> list[str]:
    """Paragraphs that have the shape of English; no two numbers share a phrase."""
    draw = random.Random(number)
    made = []
    for _ in range(paragraphs):
        words = []
        for _ in range(30):
            words += [draw.choice(SMALL), "".join(draw.choices(SYLLABLES, k=3))]
        made.append(" ".join(words).capitalize() + ".")
    return made


def page(number: int, extra: str = "", **about) -> str:
    body = "".join(f"<p>{text}</p>\n" for text in story(number))
    return f"<html lang={about.get('lang', 'en')}><body><h1>A tale</h1>{body}{extra}</body></html>"


def tar(files: dict[str, bytes | str], pack) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return pack(out.getvalue())


def deb(path, name, files, suffix=".xz", pack=lzma.compress):
    """A package as dpkg-deb writes it: an ar archive of three members."""
    control = f"Package: {name}\nVersion: 1:2.0-3\nArchitecture: all\n"
    members = {
        "debian-binary": b"2.0\n",
        f"control.tar{suffix}": tar({"control": control}, pack),
        f"data.tar{suffix}": tar(files, pack),
    }
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for member, data in members.items():
            file.write(f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode())
            file.write(data + b"\n" * (len(data) % 2))


LICENCES = (
    "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\n"
    "Files: *\nLicense: GFDL-1.3+\n text\n\nFiles: debian/*\nLicense: Expat\n"
)


@pytest.fixture
def debs(tmp_path):
    folder = tmp_path / "debs"
    folder.mkdir()
    doc = "usr/share/doc/"
    first = {f"{doc}first-doc/html/{n}.html": page(n) for n in range(6)}
    first[f"{doc}first-doc/copyright"] = LICENCES
    first[f"{doc}first-doc/changelog.gz"] = gzip.compress(b"  * many changes\n" * 99)
    first[f"{doc}first-doc/html/fr.html"] = page(50, lang="fr")
    first[f"{doc}first-doc/html/stub.html"] = "<p>Moved to the other page of this manual.</p>"
    first[f"{doc}first-doc/html/zcopy.html"] = page(3)
    deb(folder / "first-doc_2.0-3_all.deb", "first-doc", first)
    second = {f"{doc}second-doc/{n}.txt.gz": "\n\n".join(story(n)) for n in (10, 11)}
    second = {name: gzip.compress(text.encode(), mtime=0) for name, text in second.items()}
    deb(folder / "second-doc_2.0-3_all.deb", "second-doc", second, ".gz", gzip.compress)
    # Of the held-out book, one chapter is also in the first package.
    book = {f"{doc}book/ch{n}.html": page(n) for n in (20, 21, 2)}
    deb(folder / "book_2.0-3_all.deb", "book", book)
    return folder


def rows(out, part):
    lines = [line for path in sorted((out / part).glob("*")) for line in path.open()]
    return [json.loads(line) for line in lines]


def build(*inputs, out, **options):
    config = CorpusConfig(inputs=tuple(map(str, inputs)), out=str(out), **options)
    return build_corpus(config)


def test_packages_become_train_and_held_out(debs, tmp_path):
    out = tmp_path / "corpus"
    said = build(debs, out=out, held_out=("book",))
    assert said.endswith("held-out 0.0 MB in 3 documents of 1 sources")
    train, held_out = rows(out, "train"), rows(out, "held-out")
    assert [row["source"] for row in train] == ["first-doc"] * 5 + ["second-doc"] * 2
    assert {row["source"] for row in held_out} == {"book"}
    # What is held out is left out of training, whatever package it is in.
    texts = {row["text"] for row in train}
    assert not texts & {row["text"] for row in held_out}
    assert train[0] == {"text": "\n\n".join(["A tale", *story(0)]), "source": "first-doc"}
    index = json.loads((out / "corpus.json").read_text())
    assert index["held_out_shingles_in_train"] == 0
    first = index["sources"]["first-doc"]
    assert (first["version"], first["part"]) == ("1:2.0-3", "train")
    assert first["licences"] == ["Expat", "GFDL-1.3+"]
    assert first["dropped"] == {"duplicate": 2, "not English": 1, "short": 1}
    assert (first["files"], first["documents"]) == (9, 5)
    size = sum(len(row["text"].encode()) for row in train if row["source"] == "first-doc")
    assert first["bytes_after"] == size < first["bytes_before"]
    assert index["totals"]["train"]["documents"] == 7
    assert str(tmp_path) not in (out / "corpus.json").read_text()


def test_the_same_inputs_give_the_same_bytes(debs, tmp_path):
    packages = sorted(debs.glob("*.deb"))
    build(*packages, out=tmp_path / "one", held_out=("book",), quiet=True)
    build(*reversed(packages), out=tmp_path / "two", held_out=("book",), processes=2)
    for path in (tmp_path / "one").rglob("*.json*"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes()


def test_a_second_run_says_so_and_another_is_refused(debs, tmp_path, capsys):
    out = tmp_path / "corpus"
    command = ["data", "corpus", str(debs), "--out", str(out), "--held-out", "book"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert main(command) == 0
    assert capsys.readouterr().out == "already complete: " + first
    with pytest.raises(FileExistsError, match="a corpus with other held_out; choose another"):
        build(debs, out=out)
    with pytest.raises(FileExistsError, match="with other inputs and held_out"):
        build(debs / "book_2.0-3_all.deb", out=out)
    shard = out / "train/00000.jsonl"
    shard.write_text(shard.read_text()[:-9])
    with pytest.raises(FileExistsError, match=r"00000\.jsonl is missing or was changed"):
        build(debs, out=out, held_out=("book",))
    (out / "corpus.json").unlink()
    with pytest.raises(FileExistsError, match="exists and is no corpus"):
        build(debs, out=out, held_out=("book",))


def test_prepare_reads_what_was_built(debs, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "SHARD_BYTES", 4000)  # several files of a part
    build(debs, out=tmp_path / "corpus", held_out=("book",))
    assert len(list((tmp_path / "corpus/train").iterdir())) > 2
    inputs = (str(tmp_path / "corpus/train"),)
    shards = prepare(PrepareConfig(inputs=inputs, out=str(tmp_path / "shards")))
    assert shards.num_documents == 7
    text = bytes(shards.document(0)[:-1].tolist()).decode()
    assert text == rows(tmp_path / "corpus", "train")[0]["text"]


def test_a_text_full_of_code_is_still_read(tmp_path):
    body = "".join(f"<p>{text}</p><pre>x = {i}</pre>" for i, text in enumerate(story(1, 20)))
    (tmp_path / "code.html").write_text(body)
    build(tmp_path / "code.html", out=tmp_path / "out")
    assert [row["text"] for row in rows(tmp_path / "out", "train")] == ["\n\n".join(story(1, 20))]


def test_a_dictionary_is_read_with_its_index_wherever_they_stand(tmp_path):
    folder = tmp_path / "dictd"
    folder.mkdir()
    entries = [f"word{i}\n   {story(i, 1)[0]}\n" for i in range(3)]
    (folder / "new.dict.dz").write_bytes(gzip.compress("".join(entries).encode()))
    ends = [0, len(entries[0]), len(entries[0] + entries[1]), len("".join(entries))]
    digit = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    lines = [
        f"word{i}\t{digit[a // 64]}{digit[a % 64]}\t{digit[(b - a) // 64]}{digit[(b - a) % 64]}\n"
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    ]
    (folder / "new.index").write_text("".join(lines))
    (folder / "alone.dict").write_text("\n".join(entries))
    (folder / "other.index").write_text("x")
    build(folder, out=tmp_path / "out")
    [row] = rows(tmp_path / "out", "train")
    assert row["text"] == "\n\n".join(f"word{i} {story(i, 1)[0]}" for i in range(3))
    index = json.loads((tmp_path / "out/corpus.json").read_text())
    assert index["sources"]["dictd"]["dropped"] == {"no index beside the dictionary": 1}


def test_folders_and_books_are_sources(tmp_path):
    for number, name in enumerate(("tree/a.html", "tree/deep/b.htm", "novel.txt")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(number) if number < 2 else "\n\n".join(story(7)))
    build(tmp_path / "tree", tmp_path / "novel.txt", out=tmp_path / "out", held_out=("novel",))
    assert [row["source"] for row in rows(tmp_path / "out", "train")] == ["tree", "tree"]
    assert [row["source"] for row in rows(tmp_path / "out", "held-out")] == ["novel"]


def test_nothing_is_left_of_a_run_that_fails(debs, tmp_path):
    path = debs / "second-doc_2.0-3_all.deb"
    whole = path.read_bytes()
    path.write_bytes(whole[:-400])
    with pytest.raises(ValueError, match=r"second-doc.*: the package is damaged .*again"):
        build(debs, out=tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["debs"]
    path.write_bytes(b"!<arch>\n" + b"x" * 200)
    with pytest.raises(ValueError, match=r"no control\.tar in it"):
        build(debs, out=tmp_path / "corpus")
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="expected a Debian package, got a file that is no ar"):
        build(debs, out=tmp_path / "corpus")
    path.write_bytes(whole)
    (debs / "copy.deb").write_bytes(whole)
    with pytest.raises(ValueError, match=r"are both called second-doc; leave one out"):
        build(debs, out=tmp_path / "corpus")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": ("bok",)}, "held_out: expected names of sources, got bok; known are book,"),
        ({"held_out": ("book", "first-doc", "second-doc")}, "held_out: expected some sources"),
        ({"held_out": "book"}, "held_out: expected a tuple"),
        ({"processes": 0}, "processes: expected 1 or more, got 0"),
        ({"out": ""}, "out: expected a non-empty string"),
        ({"inputs": ()}, "inputs: expected one or more paths"),
    ],
)
def test_bad_settings_are_named(debs, tmp_path, options, message):
    settings = {"inputs": (str(debs),), "out": str(tmp_path / "out")} | options
    with pytest.raises(ValueError, match=message):
        build_corpus(CorpusConfig(**settings))


def test_bad_inputs_are_named(debs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"inputs: .*absent does not exist"):
        build(tmp_path / "absent", out=tmp_path / "out")
    (tmp_path / "book.pdf").write_text("no")
    with pytest.raises(ValueError, match=r"expected a \.deb, \.html, .* got .*book\.pdf"):
        build(tmp_path / "book.pdf", out=tmp_path / "out")
    with pytest.raises(ValueError, match="out: expected a folder apart from the inputs"):
        build(debs, out=debs / "out")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.txt").write_text("x = 1;\n" * 500)
    with pytest.raises(ValueError, match="no English prose was found"):
        build(tmp_path / "code", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
