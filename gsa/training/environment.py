"""What a measurement was made on: written into every result."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import gsa
from gsa.ops import describe_impl


def environment(device: torch.device | None = None) -> dict[str, object]:
    """Device, what operators and scans run as there, threads, versions, commit and date, for JSON.

    device: what was measured on; None means a CUDA device if there is one.
    """
    kind = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "operators": describe_impl("auto", device or kind)[0],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gsa": gsa.__version__,
        "commit": commit(),
    }
    for package in ("transformers", "triton"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    return facts


def device_name(device: torch.device | None = None) -> str:
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu: {cpu_name()}"


def cpu_name() -> str:
    """The processor's own name where the system tells it (Linux), else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the source tree, with + if it has uncommitted changes; None outside of git."""
    command = ["git", "-C", str(Path(gsa.__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
