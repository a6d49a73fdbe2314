"""How fast a step was and what it took: the part of its line that differs from run to run."""

from typing import Any

import torch

from gsa.model import GSAConfig
from gsa.model.cost import flops_per_token, mfu, peak_flops
from gsa.training.config import TrainConfig

GIB = 1 << 30


class Gauge:
    """Readings of steps of a run on one kind of device.

    mfu: the share of the devices' bf16 peak that the model's own FLOPs make up
    (`gsa.model.cost`); only for devices whose peak is known. memory_gib: the most that this process
    had allocated on its GPU during the step; with recorded passes, whose memory is taken once and
    for all, during the run so far.
    """

    def __init__(
        self, config: TrainConfig, model_config: GSAConfig, device: torch.device, world: int
    ) -> None:
        self._steps, self._device, self._world = config.steps, device, world
        self._flops = flops_per_token(model_config, config.seq_len).forward_backward
        self._peak = peak_of(device)
        self._by_step = device.type == "cuda" and not config.cuda_graph
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def begin(self) -> None:
        if self._by_step:
            torch.cuda.reset_peak_memory_stats(self._device)

    def readings(self, *, step: int, tokens: int, seconds: float, total: float) -> dict[str, Any]:
        """step: the one just made, of so many tokens in so many seconds. total: of all up to it."""
        speed = tokens / seconds
        line: dict[str, Any] = {
            "tokens_per_s": speed,
            "tokens_per_s_per_device": speed / self._world,
            "seconds": total,
            "eta": (self._steps - step) * total / step,
        }
        share = mfu(speed, self._flops, self._peak, devices=self._world)
        if share is not None:
            line["mfu"] = share
        if self._device.type == "cuda":
            line["memory_gib"] = torch.cuda.max_memory_allocated(self._device) / GIB
        return line


def peak_of(device: torch.device) -> float | None:
    """The device's bf16 FLOP/s, where they are known."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device))
