"""One run per run folder: a lock that the system releases when its process ends."""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from gsa.training.errors import RunError
from gsa.training.files import files_under, incomplete, sync

LOCK = ".lock"


class RunLock:
    """Holds `folder` for this process, inside a `with`; RunError if another process holds it.

    An advisory lock (flock) on `.lock`, whose text says who holds it. The file stays behind: only
    the lock counts, so nothing stale is left after kill -9. Needs a POSIX system.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> "RunLock":
        self._file = (self._folder / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise RunError(
                f"{self._folder}: in use by another run ({holder}); wait for it, stop it, or "
                "choose another out"
            ) from None
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Waits until no other process has its turn in `folder`, then has it: for what takes moments.

    Of a folder that several commands share, and that is no run folder.
    """
    with (folder / LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` to fill; then forced to disk and renamed, or dropped on errors.

    What a killed process left there is dropped, too. RunError if another process is filling it.
    """
    partial = incomplete(out.absolute())
    partial.mkdir(parents=True, exist_ok=True)
    with RunLock(partial):
        try:
            for path in partial.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
            yield partial
            for path in files_under(partial):
                sync(path)
            partial.rename(out)
            (out / LOCK).unlink()
            sync(out.absolute().parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
