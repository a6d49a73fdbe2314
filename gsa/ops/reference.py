"""Gated slot attention as one loop over tokens: the definition of correct.

Keys and values share the gate f and the write w, so they are one memory of M slots, each a row of
X = K+V numbers (paper Eq. 6):

    memory_t = Diag(f_t) · memory_{t-1} + w_t ⊗ [k_t ; v_t]
    score_t  = scale · memory_t[:, :K] · q_t
    output_t = activation(score_t)ᵀ · memory_t[:, K:]

Differentiable by plain autograd, which keeps a memory per token: use it to check, not to train.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gsa.ops.activation import activate
from gsa.ops.types import SlotActivation, SlotAttentionOutput, compute_dtype


def write_strength(log_forget: Tensor) -> Tensor:
    """w = 1 - f, without the cancellation that 1 - exp(log f) suffers near f = 1."""
    return -torch.expm1(log_forget)


def advance(
    q_BHK: Tensor,
    kv_BGX: Tensor,
    log_forget_BGM: Tensor,
    write_BGM: Tensor,
    memory_BGMX: Tensor,
    scale: float,
    slot_activation: SlotActivation,
) -> SlotAttentionOutput:
    """One token: forget, write, score, read. All arguments in the compute dtype."""
    B, H, K = q_BHK.shape
    G = kv_BGX.shape[1]
    memory_BGMX = (
        log_forget_BGM.exp()[..., None] * memory_BGMX + write_BGM[..., None] * kv_BGX[:, :, None]
    )
    keys_BGMK, values_BGMV = memory_BGMX[..., :K], memory_BGMX[..., K:]
    q_BGRK = q_BHK.unflatten(1, (G, H // G))
    score_BGRM = scale * (q_BGRK @ keys_BGMK.mT)
    output_BGRV = activate(score_BGRM, slot_activation) @ values_BGMV
    return SlotAttentionOutput(output_BGRV.flatten(1, 2), memory_BGMX)


def reference_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_forget_BTGM: Tensor,
    write_BTGM: Tensor | None,
    scale: float,
    slot_activation: SlotActivation,
    initial_memory: Tensor | None,
    cu_seqlens: Tensor | None,
) -> SlotAttentionOutput:
    """The loop, for a batch of rows or for sequences packed in one row."""
    B, T, H, K = q_BTHK.shape
    G, M, V = k_BTGK.shape[2], log_forget_BTGM.shape[3], v_BTGV.shape[3]
    dtype = compute_dtype(q_BTHK.dtype)
    q, log_forget = q_BTHK.to(dtype), log_forget_BTGM.to(dtype)
    kv_BTGX = torch.cat([k_BTGK, v_BTGV], -1).to(dtype)
    write = write_strength(log_forget) if write_BTGM is None else write_BTGM.to(dtype)

    memories = B if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_memory is None:
        memory = q.new_zeros(memories, G, M, K + V)
    else:
        memory = initial_memory.clone()

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        token = (q[:, t], kv_BTGX[:, t], log_forget[:, t], write[:, t])
        return advance(*token, memory, scale, slot_activation)

    outputs, memory = _token_by_token(step, T, memory, cu_seqlens)
    output = torch.stack(outputs, 1) if outputs else q[..., :1].expand(B, 0, H, V)
    return SlotAttentionOutput(output.to(q_BTHK.dtype), memory)


def _token_by_token(
    step: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    tokens: int,
    memory: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Outputs of all steps, and the memory after them; a packed token meets its sequence's own."""
    owner_T = None if cu_seqlens is None else sequence_of_token(cu_seqlens, tokens)
    outputs = []
    for t in range(tokens):
        if owner_T is None:
            output, memory = step(t, memory)
        else:
            owner = owner_T[t : t + 1]
            output, mine = step(t, memory.index_select(0, owner))
            memory = memory.index_copy(0, owner, mine)
        outputs.append(output)
    return outputs, memory


def sequence_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """For each of the packed tokens, the index of its sequence: int64 [T], always within [0, S)."""
    position = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    return owner.clamp(max=max(cu_seqlens.numel() - 2, 0))


def reference_step(
    q_B1HK: Tensor,
    k_B1GK: Tensor,
    v_B1GV: Tensor,
    log_forget_B1GM: Tensor,
    write_B1GM: Tensor | None,
    memory: Tensor,
    scale: float,
    slot_activation: SlotActivation,
) -> SlotAttentionOutput:
    """One token from a given memory [B, G, M, X]; returns a new memory."""
    dtype = compute_dtype(q_B1HK.dtype)
    log_forget = log_forget_B1GM[:, 0].to(dtype)
    write = write_strength(log_forget) if write_B1GM is None else write_B1GM[:, 0].to(dtype)
    kv = torch.cat([k_B1GK, v_B1GV], -1)[:, 0].to(dtype)
    output, memory = advance(
        q_B1HK[:, 0].to(dtype), kv, log_forget, write, memory, scale, slot_activation
    )
    return SlotAttentionOutput(output[:, None].to(q_B1HK.dtype), memory)


def linear_advance(
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    log_decay_BGK: Tensor,
    memory_BGKV: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One token of gated linear attention: decay, write, read. All in the compute dtype.

        memory_t = Diag(exp(log_decay_t)) · memory_{t-1} + k_t ⊗ v_t
        output_t = scale · memory_tᵀ q_t

    What gated slot attention does with its values, the write and the read weights being k and q.
    """
    G = k_BGK.shape[1]
    memory_BGKV = (
        log_decay_BGK.exp()[..., None] * memory_BGKV + k_BGK[..., None] * v_BGV[:, :, None]
    )
    output_BGRV = scale * (q_BHK.unflatten(1, (G, -1)) @ memory_BGKV)
    return output_BGRV.flatten(1, 2), memory_BGKV


def reference_linear_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_decay_BTGK: Tensor,
    scale: float,
    initial_memory: Tensor | None,
    cu_seqlens: Tensor | None,
) -> SlotAttentionOutput:
    """The loop, for a batch of rows or for sequences packed in one row."""
    B, T, H, K = q_BTHK.shape
    G, V = v_BTGV.shape[2:]
    dtype = compute_dtype(q_BTHK.dtype)
    q, k, v, log_decay = (x.to(dtype) for x in (q_BTHK, k_BTGK, v_BTGV, log_decay_BTGK))
    memories = B if cu_seqlens is None else cu_seqlens.numel() - 1
    memory = q.new_zeros(memories, G, K, V) if initial_memory is None else initial_memory.clone()

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        return linear_advance(q[:, t], k[:, t], v[:, t], log_decay[:, t], memory, scale)

    outputs, memory = _token_by_token(step, T, memory, cu_seqlens)
    output = torch.stack(outputs, 1) if outputs else q[..., :1].expand(B, 0, H, V)
    return SlotAttentionOutput(output.to(q_BTHK.dtype), memory)
