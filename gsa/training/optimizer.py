"""The optimizer: AdamW, or Muon for hidden matrices beside it.

The weight matrices of linear layers decay, nothing else does.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gsa.training.config import TrainConfig


def decay_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Trained parameters by name: (those that decay, those that do not).

    Weights of `nn.Linear` decay. Biases, norms, gate parameters, short convolutions and embeddings
    do not: decay would shrink the rows of rare tokens, which hardly ever get a gradient. A
    head tied to the embeddings is the embeddings.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - embeddings
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = {name: p for name, p in trained.items() if id(p) in matrices}
    return decayed, {name: p for name, p in trained.items() if name not in decayed}


class Optimizers:
    """One or several optimizers, each with parameters of its own, used as one."""

    def __init__(self, members: Iterable[torch.optim.Optimizer]) -> None:
        self.members = list(members)
        self._owner = {
            id(parameter): member
            for member in self.members
            for group in member.param_groups
            for parameter in group["params"]
        }

    def step(self, lr: float) -> None:
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = lr * group["rate"]
            member.step()

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The moments of a parameter, by name; empty before the first step."""
        return self._owner[id(parameter)].state[parameter]

    def has_state(self, parameter: nn.Parameter) -> bool:
        owner = self._owner.get(id(parameter))
        return owner is not None and parameter in owner.state


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizers:
    """AdamW over both groups (fused: one pass over each tensor, deterministic).

    As "muon", decaying matrices but that of the head go to Muon (Jordan et al. 2024), with updates
    scaled to AdamW's (Liu et al. 2025, "Muon is scalable for LLM training"), so that lr and decay
    mean the same for both.
    """
    decayed, others = decay_groups(model)
    members: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        head = getattr(model, "lm_head", None)
        hidden = {n: p for n, p in decayed.items() if head is None or p is not head.weight}
        decayed = {name: p for name, p in decayed.items() if name not in hidden}
        muon = torch.optim.Muon(
            _groups(hidden, config, config.weight_decay),
            lr=config.lr,
            adjust_lr_fn="match_rms_adamw",
        )
        members.append(muon)
    groups = _groups(decayed, config, config.weight_decay) + _groups(others, config, 0.0)
    betas = (config.beta1, config.beta2)
    members.append(torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=1e-8, fused=True))
    return Optimizers(members)


def rate_of(parameter: str, rates: dict[str, float]) -> float:
    """The factor on lr for the parameter of that name; 0 freezes it. rates: as in TrainConfig."""
    fitting = [part for part in rates if part in parameter]
    return rates[max(fitting, key=len)] if fitting else 1.0


def _groups(
    parameters: dict[str, nn.Parameter], config: TrainConfig, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of equal `rate_of`."""
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        by_rate.setdefault(rate_of(name, config.rates), []).append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay, "rate": rate}
        for rate, members in by_rate.items()
    ]


def flat_state(model: nn.Module, optimizer: Optimizers) -> dict[str, Tensor]:
    """The optimizer's state as a flat dict of tensors, "state.<parameter>.<moment>"."""
    return {
        f"state.{name}.{moment}": value
        for name, parameter in model.named_parameters()
        if optimizer.has_state(parameter)
        for moment, value in optimizer.state_of(parameter).items()
    }


def empty_state(
    model: nn.Module, optimizer: Optimizers, stored: dict[str, TensorStorageMetadata]
) -> dict[str, Tensor]:
    """Gives the optimizer zeros for the `flat_state` that is stored, and returns them to be filled.

    ValueError unless that has this model's trained parameters and shapes. One that has never had a
    gradient, and any before the first step, has none.
    """
    entries = {key: value for key, value in stored.items() if key.startswith("state.")}
    parameters = dict(model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    found = {key.removeprefix("state.").rpartition(".")[0] for key in entries}
    if not found <= trained:
        odd = ", ".join(sorted(found - trained))
        raise ValueError(f"optimizer state: expected this model's trained parameters, got {odd}")
    state = {}
    for key, entry in entries.items():
        name, _, moment = key.removeprefix("state.").rpartition(".")
        parameter = parameters[name]
        if moment == "step":
            value = torch.zeros(entry.size, dtype=entry.properties.dtype, device=parameter.device)
        elif entry.size == parameter.shape:
            value = torch.zeros_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
        else:
            raise ValueError(
                f"optimizer state: {key}: expected shape {list(parameter.shape)}, got "
                f"{list(entry.size)}"
            )
        optimizer.state_of(parameter)[moment] = state[key] = value
    return state
