"""What every token mixer takes and gives."""

from typing import NamedTuple

from torch import Tensor

State = dict[str, Tensor]
"""What a mixer carries from one call to the next; every tensor has the batch first."""


class MixerOutput(NamedTuple):
    """What a token mixer returns.

    output: [B, T, D].
    state: what the next call needs.
    step: the token-wise quantities [B, T, …] from which that state can be made again.
    """

    output: Tensor
    state: State
    step: State
