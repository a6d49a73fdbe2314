"""Where the corpus comes from: Debian packages, folders and single files, and the files in them.

A package is read as it was downloaded: an ar archive that holds two tar archives, of which nothing
is unpacked to disk.
"""

import gzip
import hashlib
import importlib.util
import io
import lzma
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from gsa.data.shards import file_sha256

Advance = Callable[[int], object]
"""Called with a number of bytes of the input just read."""

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60
_LEFT_OUT = re.compile(
    r"(?:^|/)(?:_sources|_modules|_static|_downloads|doc-base|locale|translations|src|licenses?)/|"
    r"(?:^|/)(?:cs|da|de|el|es|eu|fi|fr|gl|hr|hu|id|it|ja|ko|lt|nb|nl|nn|no|pl|pt|ro|ru|sk|sl|sv|tr|"
    r"uk|vi|zh)(?:[_-]\w\w)?/|"
    r"(?:^|/)(?:changelog|changes|copyright|copying|licen[sc]es?|news|todo|authors|contributors|"
    r"credits|thanks|maintainers|readme\.debian|genindex|py-modindex|search|robots|cmakelists|"
    r"requirements|doc-index|fdl|gpl|lgpl|gfdl|acknowledge?ments|bibliography|references|"
    r"colophon)[^/]*$",
    re.IGNORECASE,
)
_MANUAL = re.compile(r"(?:^|/)man[1-9]/[^/]+\.[1-9]\w*$")


class File(NamedTuple):
    """A file of a source that may hold prose."""

    path: str
    kind: str
    """One of `html`, `text`, `manual`, `dictionary`, `index`."""
    data: bytes


@dataclass(frozen=True)
class Source:
    """A package, a folder or a file: what is trained on or held out as a whole."""

    name: str
    path: Path
    version: str | None
    sha256: str
    size: int
    """Bytes that `files` will report to `advance`."""

    def files(self, advance: Advance, about: dict[str, Any]) -> Iterator[File]:
        """The files that may hold prose, in the input's order; licences go to `about`.

        ValueError for a package that breaks off or is damaged, gzip members included.
        """
        texts = _package_files if self.path.suffix == ".deb" else _tree_files
        for path, read in texts(self.path, advance):
            if PurePosixPath(path).name == "copyright":
                about["licences"] = sorted({*about.get("licences", ()), *licences(read())})
            kind = kind_of(path)
            if kind:
                yield File(path, kind, _unzipped(read(), f"{self.path}: {path}"))


def kind_of(path: str) -> str | None:
    """How a file of this name is read; None if it is not read at all."""
    name = path.lower().removesuffix(".gz")
    if _LEFT_OUT.search(name):
        return None
    if re.search(r"\.(?:x?html?)(?:\.en)?$", name):
        return "html"
    if name.endswith((".txt", ".rst")):
        return "text"
    if name.endswith(".dict.dz") or name.endswith(".dict"):
        return "dictionary"
    if name.endswith(".index"):
        return "index"
    return "manual" if _MANUAL.search(name) else None


def licences(copyright_file: bytes) -> set[str]:
    """Short names of the licences that debian/copyright states, as far as a machine can read it."""
    text = copyright_file.decode("utf-8", errors="replace")
    if re.match(r"\s*Format(?:-Specification)?:", text):
        return set(re.findall(r"^License:[ \t]*(\S[^\n]*?)\s*$", text, re.MULTILINE))
    return {name.rstrip(".") for name in re.findall(r"/common-licenses/([\w.+-]+)", text)}


def find_sources(inputs: tuple[str, ...]) -> list[Source]:
    """Every source that the inputs mean, by name.

    A folder that holds .deb files stands for those packages, any other folder for one source; a
    file is a source of its own. FileNotFoundError for a path that does not exist; ValueError for a
    file of another kind, a damaged package, or two sources of one name.
    """
    sources: dict[str, Source] = {}
    for given in inputs:
        path = Path(given)
        if not path.exists():
            raise FileNotFoundError(f"inputs: {path} does not exist")
        packages = sorted(path.glob("*.deb")) if path.is_dir() else []
        for one in packages or [path]:
            source = _open_source(one)
            if source.name in sources:
                raise ValueError(
                    f"inputs: {one} and {sources[source.name].path} are both called "
                    f"{source.name}; leave one out, or rename it"
                )
            sources[source.name] = source
    return [sources[name] for name in sorted(sources)]


def _open_source(path: Path) -> Source:
    if path.is_dir():
        digest, size = hashlib.sha256(), 0
        for name in _names_below(path):
            digest.update(f"{name}\0{file_sha256(path / name)}\n".encode())
            size += (path / name).stat().st_size
        return Source(path.resolve().name, path, None, digest.hexdigest(), size)
    size = path.stat().st_size
    if path.suffix != ".deb":
        if kind_of(path.name) not in ("html", "text", "manual"):
            raise ValueError(
                f"inputs: expected a .deb, .html, .rst or .txt file, a manual page below man1 … "
                f"man9, or a folder of those, got {path}"
            )
        return Source(path.stem, path, None, file_sha256(path), size)
    with _package_member(path, "control.tar", lambda n: None) as members:
        control = next((m for m in members if m.name.lstrip("./") == "control"), None)
        file = control and members.extractfile(control)
        if not file:
            raise ValueError(f"{path}: expected a Debian package, got one without a control file")
        fields = dict(re.findall(r"^([\w-]+):[ \t]*(.*)$", file.read().decode(), re.MULTILINE))
    return Source(fields["Package"], path, fields["Version"], file_sha256(path), size)


def _names_below(folder: Path) -> list[str]:
    """Files below a folder by their path in it, sorted; hidden ones are left out."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(parent).relative_to(folder)
        found += [(here / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def _tree_files(path: Path, advance: Advance) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for name in _names_below(path) if path.is_dir() else [""]:
        file = path / name
        yield name or path.name, file.read_bytes
        advance(file.stat().st_size)


def _package_files(path: Path, advance: Advance) -> Iterator[tuple[str, Callable[[], bytes]]]:
    with _package_member(path, "data.tar", advance) as members:
        for member in members:
            if member.isfile():
                file = members.extractfile(member)
                assert file
                yield member.name.removeprefix("./"), file.read


@contextmanager
def _package_member(path: Path, name: str, advance: Advance) -> Iterator[tarfile.TarFile]:
    """One of the two tar archives inside a .deb, as a stream."""
    with path.open("rb") as file:
        found, size = _find_member(file, path, name)
        part = _Part(file, size, advance)
        raw = io.BufferedReader(part, 1 << 16)
        try:
            with (
                _decompressed(raw, found, path) as stream,
                tarfile.open(fileobj=stream, mode="r|") as members,
            ):
                yield members
        except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(
                f"{path}: the package is damaged ({error}); download it again"
            ) from error


def _find_member(file: IO[bytes], path: Path, name: str) -> tuple[str, int]:
    """Moves to the data of an ar member: its full name and size in bytes."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise ValueError(f"{path}: expected a Debian package, got a file that is no ar archive")
    while len(header := file.read(_AR_HEADER)) == _AR_HEADER:
        found = header[:16].decode("ascii", errors="replace").strip().rstrip("/")
        digits = header[48:58].strip()
        if header[58:] != b"`\n" or not digits.isdigit():
            break
        size = int(digits)
        if found.startswith(name):
            return found, size
        file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError(f"{path}: the package is damaged (no {name} in it); download it again")


class _Part(io.RawIOBase):
    """The next `size` bytes of a file, as a file; tells `advance` what it gave."""

    def __init__(self, file: IO[bytes], size: int, advance: Advance) -> None:
        self._file = file
        self._left = size
        self._advance = advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        self._advance(len(data))
        return len(data)


def _decompressed(raw: Any, name: str, path: Path) -> Any:
    suffix = PurePosixPath(name).suffix
    if suffix == ".xz":
        return lzma.open(raw)
    if suffix == ".gz":
        return gzip.open(raw)
    if suffix == ".tar":
        return raw
    if suffix == ".zst":
        if importlib.util.find_spec("compression") is not None:  # Python 3.14
            from compression import zstd  # type: ignore

            return zstd.open(raw)
        if importlib.util.find_spec("zstandard") is None:
            raise ImportError(
                f"inputs: {path} is compressed with zstd, which needs Python 3.14 or the package "
                "zstandard; pip install zstandard, or unpack it yourself with dpkg-deb -x"
            )
        import zstandard  # type: ignore

        return zstandard.ZstdDecompressor().stream_reader(raw)
    raise ValueError(f"{path}: expected xz, gz or zst inside the package, got {name}")


def _unzipped(data: bytes, place: str) -> bytes:
    """Gzip members unpacked (dictzip is gzip, too), recognised by their first bytes."""
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise ValueError(f"{place}: the file is damaged ({error}); get the input again") from error
