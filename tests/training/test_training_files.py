"""Files and folders are whole or absent, whoever else writes them; errors say which it is."""

import pytest
import torch

from gsa.training import RunError
from gsa.training.distributed import Team
from gsa.training.files import naming
from gsa.training.lock import RunLock, made_whole
from gsa.training.setup import pick_device


def test_two_processes_never_fill_one_folder(tmp_path):
    out, theirs = tmp_path / "model", tmp_path / ".model.incomplete"
    theirs.mkdir()
    (theirs / "config.json").write_text("half")
    with RunLock(theirs):
        with pytest.raises(RunError, match=r"in use by another run \(pid"), made_whole(out):
            raise AssertionError("entered")
        assert (theirs / "config.json").read_text() == "half"
    with made_whole(out) as partial:  # that process is gone
        (partial / "weights").write_text("whole")
        assert not out.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "weights"]


def test_a_folder_that_could_not_be_filled_is_not_there(tmp_path):
    with pytest.raises(OSError, match="no room"), made_whole(tmp_path / "model") as partial:
        (partial / "config.json").write_text("half")
        raise OSError("no room")
    assert not any(tmp_path.iterdir())


def test_a_full_disk_names_the_file(tmp_path):
    words = r"No space left on device: .*report\.md"
    report, full = tmp_path / "report.md", open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match=words), naming(report), full:
        full.write("x")


def test_a_device_that_holds_no_numbers_is_refused():
    with pytest.raises(ValueError, match="device: 'meta' cannot be used here"):
        pick_device("meta", Team())
    assert pick_device("cpu", Team()) == torch.device("cpu")
