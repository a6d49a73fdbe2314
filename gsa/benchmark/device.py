"""Which device a benchmark runs on."""

import torch


def bench_device(name: str) -> str:
    """cpu or cuda, for what the user asked: auto takes a CUDA device if there is one.

    Raises:
        ValueError: an unknown name, or a CUDA device where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError(
            "device: expected a CUDA device, but torch sees none; see gsa info, or use --device cpu"
        )
    return "cuda" if available and name != "cpu" else "cpu"
