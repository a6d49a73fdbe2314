"""Makes the helper modules beside this file importable, whatever pytest's import mode, and kernels
run on any machine: without a CUDA device in Triton's interpreter, on CPU tensors. And saves time.
"""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when imported, so do processes below

import torch

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported


def pytest_collection_modifyitems(items):
    """First what shares runs of many processes, which is then made once: a worker that has nothing
    left to do takes another's last tests."""
    items.sort(key=lambda item: "runs" not in getattr(item, "fixturenames", ()))


def pytest_collection_finish():
    """A million objects of libraries are there to stay: the collector need not walk them again."""
    gc.collect()
    gc.freeze()
