"""Seconds from nothing to the first gradients: a fresh process with an empty Triton cache."""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import gsa
from gsa.benchmark.cases import Case

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from gsa.benchmark.cold_start import child
child(sys.argv[2])
"""


def cold_start(case: Case, *, device: str, impl: str, timeout: float) -> dict[str, object]:
    """Forward and backward in a child process, its seconds part by part.

    `env` sets Triton's cache folder for the child alone. torch's files may well be in the system's
    page cache, so this is the start of a process, not that of a machine.
    """
    with tempfile.TemporaryDirectory(prefix="gsa-cold-start-") as cache:
        sizes = asdict(case)
        request = {"case": sizes, "device": device, "impl": impl, "started": time.time()}
        root = str(Path(gsa.__file__).parent.parent)
        command = ["env", f"TRITON_CACHE_DIR={cache}", sys.executable, "-c", PROGRAM, root]
        try:
            done = subprocess.run(
                [*command, json.dumps(request)],
                capture_output=True,
                text=True,
                check=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {timeout:g} s"}
        except subprocess.CalledProcessError as error:
            return {"failed": (error.stderr.strip().splitlines() or ["no message"])[-1]}
        result = json.loads(done.stdout.splitlines()[-1])
        compiled = {path.stem for path in Path(cache).rglob("*.cubin")}
        return {**result, "kernels_compiled": len(compiled)}


def child(request_json: str) -> None:
    """The child process: prints its seconds as JSON."""
    entered = time.time()
    import torch

    from gsa.benchmark.contenders import make_inputs, ours

    request = json.loads(request_json)
    imported = time.time()
    device = torch.device(request["device"])
    contender = ours(
        make_inputs(Case(**request["case"]), device, cache_bytes=0),
        request["impl"],
        recompute=True,
    )
    synchronize(device)
    ready = time.time()
    contender.forward_backward()
    synchronize(device)
    done = time.time()
    parts = {
        "total_seconds": done - request["started"],
        "python_seconds": entered - request["started"],
        "import_seconds": imported - entered,
        "device_seconds": ready - imported,
        "operator_seconds": done - ready,
        "without_import_seconds": done - imported,
    }
    print(json.dumps({name: round(seconds, 3) for name, seconds in parts.items()}))


def synchronize(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
