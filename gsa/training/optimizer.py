"""AdamW in two groups: the weight matrices of linear layers decay, nothing else does."""

import torch
from torch import Tensor, nn

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


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over both groups. The fused form: one pass over each tensor, deterministic."""
    decayed, others = decay_groups(model)
    groups = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": list(others.values()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True
    )


def flat_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as a flat dict of tensors, "state.<parameter>.<moment>"."""
    return {
        f"state.{name}.{moment}": value
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def load_flat_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    """Put a `flat_state` back; ValueError unless it has exactly this model's parameters and shapes.

    No state at all is that of an optimizer that has not stepped yet.
    """
    if not state:
        return
    parameters = dict(model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    found = {key.removeprefix("state.").rpartition(".")[0] for key in state}
    if found != trained:
        odd = ", ".join(sorted(found ^ trained))
        raise ValueError(f"optimizer state: expected this model's parameters, differing in: {odd}")
    for key, value in state.items():
        name, _, moment = key.removeprefix("state.").rpartition(".")
        parameter = parameters[name]
        if moment != "step" and value.shape != parameter.shape:
            raise ValueError(
                f"optimizer state: {key}: expected shape {list(parameter.shape)}, got "
                f"{list(value.shape)}"
            )
        # A copy: the value may be a view of the checkpoint's file, which will be deleted.
        optimizer.state[parameter][moment] = value.to(parameter.device, copy=True)
