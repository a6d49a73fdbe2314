"""From gate logits to what the memory forgets and writes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.layers.token_layout import TokenLayout
from gsa.ops.types import compute_dtype

GATES = ("data_dependent", "data_independent", "abc", "abc_printed")

# Log of the normaliser before the first token: far below any logit, yet finite, so that nothing
# derived from it is nan.
NO_TOKENS = -1e30


def spread_logits(heads: int, slots: int) -> Tensor:
    """Logits [G, M] from 0 to 6 in each head: half-lives of about 8 to 2000 tokens at tau = 8."""
    return torch.linspace(0, 6, slots).expand(heads, slots)


class StaticGate(nn.Module):
    """Gate logits that ignore the token: one learned number per key/value head and slot.

    Spread at the start: slots that start equal would stay equal, since nothing else tells them
    apart.
    """

    def __init__(self, heads: int, slots: int):
        super().__init__()
        self.logits = nn.Parameter(torch.empty(heads, slots))
        with torch.no_grad():
            self.logits.copy_(self.initial_logits())

    def initial_logits(self) -> Tensor:
        """[G, M]."""
        return spread_logits(*self.logits.shape).to(self.logits.device)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        return self.logits.flatten().expand(B, T, -1)


def forget_gate(logits_BTGM: Tensor, tau: float, pads: Tensor | None) -> Tensor:
    """log f = logsigmoid(logits) / tau in fp32 (fp64 for fp64); 0 at padding: keep all, write none.

    Paper §3.3: f = sigmoid(W_f x)^(1/tau), tau = 8. The write is 1 - f, left to the operator.
    """
    log_forget = F.logsigmoid(logits_BTGM.to(compute_dtype(logits_BTGM.dtype))) / tau
    return log_forget if pads is None else log_forget.masked_fill(pads[..., None, None], 0.0)


def bounded_gate(logits_BTGK: Tensor, log_bound: Tensor | None, pads: Tensor | None) -> Tensor:
    """HGRN2's log f = log(γ + (1 - γ) · sigmoid(logits)) in fp32 (fp64 for fp64); 0 at padding.

    Args:
        log_bound: log γ [G·K], from `LowerBounds`; None for γ = 0.
    """
    logits = logits_BTGK.to(compute_dtype(logits_BTGK.dtype))
    log_forget = F.logsigmoid(logits)
    if log_bound is not None:
        # γ + (1 - γ) σ(a) = σ(a) + γ σ(-a); rounding must not bring it above 1.
        kept = log_bound.view(logits.shape[2:]) + F.logsigmoid(-logits)
        log_forget = torch.logaddexp(log_forget, kept).clamp(max=0.0)
    return log_forget if pads is None else log_forget.masked_fill(pads[..., None, None], 0.0)


class LowerBounds(nn.Module):
    """What the forget gates of a model's layers stay above: HGRN2's, learned for each key.

        γ_l = Σ_{0<j≤l} softmax(logits)_j        l = 0 … L-1, the softmax over layers

    "HGRN2: Gated Linear RNNs with State Expansion" (arXiv 2404.07904): no bound in the first layer,
    higher ones in higher layers, which thus keep longer. Logits [L, width] are 0 at the start: l/L.
    """

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(layers, width))

    def forward(self) -> list[Tensor | None]:
        """log γ [width] of each layer, fp32 (fp64 for fp64); None for the first."""
        logits = self.logits.to(compute_dtype(self.logits.dtype))
        return [None, *logits.log_softmax(0)[1:].logcumsumexp(0).unbind(0)]


def abc_gate(
    logits_BTGM: Tensor, layout: TokenLayout, normalizer: Tensor | None, *, decay: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gates of attention with bounded-memory control (ABC), as a memory that forgets.

    With z_t = log Σ_{i≤t} exp(a_i) the running normaliser of the logits a:

        log_forget = z_{t-1} - z_t   (0 at the first token)        write = exp(a_t - z_t)

    computed as logsigmoid and sigmoid of z_{t-1} - a_t, which loses no digits. `decay=False` is the
    paper's Eq. 3 to the letter: the same write, nothing forgotten. Padding leaves z alone.

    Args:
        normalizer: z before these tokens, fp32 [B, G, M]; None at the start.

    Returns:
        (log_forget, write, z), each [B, T, G, M], fp32 (fp64 for fp64).
    """
    a = logits_BTGM.to(compute_dtype(logits_BTGM.dtype))
    if layout.pads is not None:
        a = a.masked_fill(layout.pads[..., None, None], NO_TOKENS)
    if normalizer is None:
        normalizer = torch.full_like(a[:, 0], NO_TOKENS)
    z = torch.logaddexp(_running_logsumexp(a, layout), normalizer[:, None].to(a.dtype))
    before = torch.cat([normalizer[:, None].to(a.dtype), z[:, :-1]], 1)
    if layout.documents is not None:
        before = before.masked_fill((layout.positions == 0)[..., None, None], NO_TOKENS)
    log_forget = F.logsigmoid(before - a).masked_fill(before <= NO_TOKENS / 2, 0.0)
    write = torch.sigmoid(a - before)
    if layout.pads is not None:
        log_forget = log_forget.masked_fill(layout.pads[..., None, None], 0.0)
        write = write.masked_fill(layout.pads[..., None, None], 0.0)
    return (log_forget if decay else torch.zeros_like(log_forget)), write, z


def _running_logsumexp(a_BTGM: Tensor, layout: TokenLayout) -> Tensor:
    """log Σ_{i≤t} exp(a_i) within each document, in log2(T) doubling steps."""
    T, reach, total = a_BTGM.shape[1], 1, a_BTGM
    while reach < T:
        earlier = F.pad(total[:, :-reach], (0, 0, 0, 0, reach, 0), value=NO_TOKENS)
        if layout.documents is not None:
            earlier = earlier.masked_fill((layout.positions < reach)[..., None, None], NO_TOKENS)
        total = torch.logaddexp(total, earlier)
        reach *= 2
    return total
