"""How far the rows of a pool are, on their device: which token comes next, and what follows."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gsa.generation.sampling import MAX_ENDS, Choices, Needs, draw, shape
from gsa.layers.token_layout import TokenLayout
from gsa.ops.api import describe_impl


class Progress:
    """Tensors of P rows whose addresses stay; `advance` moves them on without the host.

    token, position, left: int64 [P], the token that a row reads next, how many it has read before,
        how many it may still write.
    live: bool [P], whether it goes on. stops: int64 [P, MAX_ENDS], tokens that end it, or -1.
    emitted: int64 [2, P], the token that a row has written in the step, or -1; whether it goes on.
    asleep, places: bool and int64 [P, 1], the step's layout, which follows from live and position.
    """

    def __init__(self, rows: int, device: torch.device):
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        self.token, self.position, self.left = zeros.clone(), zeros.clone(), zeros.clone()
        self.live = zeros.bool()
        self.stops = zeros[:, None].expand(rows, MAX_ENDS).clone()
        self.emitted = torch.stack([zeros, zeros])
        self.asleep, self.places = ~self.live[:, None], zeros[:, None] - 1
        on_cuda = device.type == "cuda"
        self.by_kernel = on_cuda and describe_impl("auto", device)[0] == "triton"
        self._shape, self._move = shape, self._by_torch

    @property
    def layout(self) -> TokenLayout:
        """Of the tokens that the rows read next."""
        return TokenLayout(self.places, self.asleep)

    def start(self, row: int, token: int, position: int, left: int, stops: Iterable[int]) -> None:
        """Lets a row go on, without waiting for the device."""
        self.token[row], self.position[row], self.left[row] = token, position, left
        self.stops[row].fill_(-1)
        for place, stop in enumerate(sorted(stops)):
            self.stops[row, place] = stop
        self.live[row], self.asleep[row], self.places[row] = True, False, position

    def rest(self, row: int) -> None:
        """Lets a row go on no more, without waiting for the device."""
        self.live[row], self.asleep[row], self.places[row] = False, True, -1

    @contextmanager
    def all_at_rest(self) -> Iterator[None]:
        """Meanwhile a step leaves every row as it is, but for `emitted`."""
        kept = [(x, x.clone()) for x in (self.live, self.asleep, self.places)]
        for x, value in zip((self.live, self.asleep, self.places), (False, True, -1), strict=True):
            x.fill_(value)
        try:
            yield
        finally:
            for x, before in kept:
                x.copy_(before)

    def compile(self, through: Callable[[Any], Any]) -> None:
        """Sends what torch does of `advance` through a compiler."""
        self._shape, self._move = through(shape), through(self._by_torch)

    def advance(self, logits_PW: Tensor, choices: Choices, needs: Needs) -> None:
        """From logits [P, W] to the next token of every row; on CUDA devices one kernel.

        There a cut goes through torch first, so that a row's token does not depend on whether
        another row asks for one.
        """
        if not self.by_kernel:
            self._move(logits_PW, choices, needs)
            return
        from gsa.ops.triton.choose import choose

        logits_PW = self._shape(logits_PW, choices, needs) if needs.cut else logits_PW
        choose(
            logits_PW, self, choices,
            shaped=needs.cut, chance=needs.chance, penalty=needs.penalty,
        )  # fmt: skip

    def _by_torch(self, logits_PW: Tensor, choices: Choices, needs: Needs) -> None:
        was_live = self.live.clone()
        position = self.position + was_live
        drawn = draw(shape(logits_PW, choices, needs), choices, position, needs)
        chosen = torch.where(was_live, drawn, self.token)
        left = self.left - was_live.long()
        live = was_live & (left > 0) & ~(self.stops == chosen[:, None]).any(1)
        met = choices.met
        known = met.gather(1, chosen[:, None]) | was_live[:, None]
        met.scatter_(1, chosen[:, None], known)
        self.token.copy_(chosen)
        self.position.copy_(position)
        self.left.copy_(left)
        self.live.copy_(live)
        self.asleep.copy_(~live[:, None])
        self.places.copy_(torch.where(live, position, -1)[:, None])
        self.emitted[0].copy_(torch.where(was_live, chosen, -1))
        self.emitted[1].copy_(live)
