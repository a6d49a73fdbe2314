"""The language model: blocks of token mixer and MLP, in the form transformers expects."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from gsa.layers.gate import LowerBounds, StaticGate
from gsa.layers.linear_attention import LinearAttention
from gsa.layers.mamba import Mamba
from gsa.layers.mlp import SwiGLU
from gsa.layers.norm import HeadNorm, RMSNorm
from gsa.layers.options import (
    LinearAttentionOptions,
    MambaOptions,
    RWKV6Options,
    SlotAttentionOptions,
    SoftmaxAttentionOptions,
)
from gsa.layers.rwkv6 import RWKV6
from gsa.layers.short_convolution import ShortConvolution
from gsa.layers.slot_attention import GatedSlotAttention
from gsa.layers.softmax_attention import SoftmaxAttention
from gsa.layers.token_layout import TokenLayout
from gsa.model.cache import GSACache, GSAGenerationMixin, check_cache
from gsa.model.config import GSAConfig
from gsa.model.loading import (
    check_loaded,
    is_old_layout,
    read_names,
    read_weights,
    to_new_layout,
)
from gsa.model.loss import CHUNK_LOGITS, next_token_loss, next_token_loss_of_hidden

MIXERS: dict[type, type[Any]] = {
    SlotAttentionOptions: GatedSlotAttention,
    LinearAttentionOptions: LinearAttention,
    RWKV6Options: RWKV6,
    MambaOptions: Mamba,
    SoftmaxAttentionOptions: SoftmaxAttention,
}
"""The token mixer of each kind of options."""


class GSABlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then + MLP(norm(·)), if any: the pre-norm block of paper Figure 2."""

    def __init__(self, config: GSAConfig, layer: int):
        super().__init__()
        self.layer = layer
        options = config.mixer_options(layer)
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = MIXERS[type(options)](options)
        has_mlp = config.mlp_width > 0
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, affine=has_mlp)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_width)

    def forward(
        self,
        x_BTD: Tensor,
        layout: TokenLayout,
        past_key_values: GSACache | None = None,
        log_bound: Tensor | None = None,
    ) -> Tensor:
        state = None if past_key_values is None else past_key_values.layers[self.layer].state
        bound = () if log_bound is None else (log_bound,)
        mixed = self.attn(self.attn_norm(x_BTD), layout, state, *bound)
        if past_key_values is not None:
            past_key_values.advance(self.layer, mixed)
        x_BTD = x_BTD + mixed.output
        return x_BTD if self.mlp.absent else x_BTD + self.mlp(self.mlp_norm(x_BTD))


class GSAPreTrainedModel(PreTrainedModel):
    """Initialisation and loading, shared by the bare model and the language model."""

    config: GSAConfig
    config_class = GSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GSABlock"]  # noqa: RUF012
    _input_embed_layer = "embeddings"
    _weights_that_may_be_left_over: tuple[str, ...] = ()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Linear and embedding weights from N(0, initializer_range²), norms 1, biases 0.

        The paper says nothing about it; this is what its code base does for all its models.
        """
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, RMSNorm) and module.weight is not None:
            init.ones_(module.weight)
        elif isinstance(module, ShortConvolution):
            bound = module.conv_size**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, StaticGate):
            init.copy_(module.logits, module.initial_logits())
        elif isinstance(module, LowerBounds):
            init.zeros_(module.logits)
        elif isinstance(module, HeadNorm):
            for name, parameter in module.named_parameters():
                init.constant_(parameter, float(name == "weight"))
        elif isinstance(module, RWKV6 | Mamba):
            if isinstance(module, RWKV6):
                init.normal_(module.shift_out, mean=0.0, std=std)
            for name, value in module.initial().items():
                init.copy_(module.get_parameter(name), value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but every weight must find its place and every place its weight.

        Reads safetensors only. Weights under the names of September 2024 are recognised by them,
        renamed and split; their output norm runs at the config's eps, that of later ones at 1e-5.

        Raises:
            ValueError: naming the weights that are missing, left over or of another shape, or a
                tied head that differs from the embedding.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True}
        where = pretrained_model_name_or_path
        loaded: Any = super().from_pretrained(where, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        check_loaded(where, info, allowed=cls._weights_that_may_be_left_over)
        head = model.get_output_embeddings()
        tied = head is None or head.weight is model.get_input_embeddings().weight
        if model.config.tie_word_embeddings and not tied:
            raise ValueError(
                f"{where}: tie_word_embeddings: expected False, since lm_head.weight and "
                "model.embeddings.weight differ, got True"
            )
        return (model, info) if wants_info else model

    @staticmethod
    def _load_pretrained_model(
        model: Any,
        state_dict: dict | None,
        checkpoint_files: list | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        names = read_names(checkpoint_files or []) if state_dict is None else list(state_dict)
        if is_old_layout(names):
            if state_dict is None:
                state_dict, checkpoint_files = read_weights(checkpoint_files or []), None
            state_dict = to_new_layout(state_dict)
        elif model.config.settle_output_norm_eps():
            for module in model.modules():
                if isinstance(module, GatedSlotAttention) and module.options.output_norm:
                    module.g_norm.eps = model.config.output_norm_eps
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, *args, **kwargs
        )


class GSAModel(GSAPreTrainedModel):
    """Embedding, blocks, final norm: token ids [B, T] to hidden states [B, T, D]."""

    _weights_that_may_be_left_over = ("lm_head.",)

    def __init__(self, config: GSAConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GSABlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        width = config.lower_bound_width
        self.lower_bounds = None if width is None else LowerBounds(len(self.layers), width)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GSACache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states of tokens [B, T], or of their embeddings [B, T, D].

        Args:
            attention_mask: [B, T], with a cache [B, past+T]; 0 at padding, which may be anywhere.
            position_ids: [B, T]; used by rotary embeddings and windows only.
            past_key_values: a cache to continue from; it is advanced.
            use_cache: whether to return a cache; None means config.use_cache, outside training.
            output_hidden_states: also returns the embeddings and every block's output.
            cu_seqlens: [S+1], boundaries of documents packed in one row (B = 1); memory, positions
                and attention start anew at each. Excludes a cache and a mask.
            max_seqlen: tokens that no document of cu_seqlens exceeds; softmax attention then takes
                time linear in T. Checked where cu_seqlens is on the CPU.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "input_ids: expected either input_ids or inputs_embeds, got both or none"
            )
        x_BTD = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seqlens is None
        checkpointing = self.gradient_checkpointing and self.training
        if past_key_values is not None:
            check_cache(past_key_values)
            if checkpointing:
                raise ValueError(
                    "past_key_values: expected None while training with gradient checkpointing "
                    "(the recomputation would advance it twice), got a cache"
                )
        elif use_cache and not checkpointing:
            past_key_values = GSACache(self.config)
        if max_seqlen is not None and cu_seqlens is None:
            raise ValueError(f"max_seqlen: expected None without cu_seqlens, got {max_seqlen}")
        layout = token_layout(
            x_BTD, attention_mask, position_ids, past_key_values, cu_seqlens, max_seqlen
        )
        if layout.pads is not None:
            # Whatever stands at padding, nan included, must not reach a product with a zero write.
            x_BTD = x_BTD.masked_fill(layout.pads[..., None], 0.0)
        states = [x_BTD]
        for block, log_bound in zip(self.layers, self.log_bounds(), strict=True):
            x_BTD = block(x_BTD, layout, past_key_values=past_key_values, log_bound=log_bound)
            states.append(x_BTD)
        states[-1] = x_BTD = self.norm(x_BTD)
        if past_key_values is not None:
            past_key_values.seen(x_BTD.shape[1])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def log_bounds(self) -> list[Tensor | None]:
        """For each layer the log of what its forget gates stay above [G·K]; None for no bound."""
        if self.lower_bounds is None:
            return [None] * len(self.layers)
        return [
            bound if isinstance(block.attn, LinearAttention) else None
            for block, bound in zip(self.layers, self.lower_bounds(), strict=True)
        ]


def token_layout(
    x_BTD: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: GSACache | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None = None,
) -> TokenLayout:
    """Padding, positions and documents of a batch, made once for all layers."""
    B, T, _ = x_BTD.shape
    past = 0 if cache is None else cache.length
    if cu_seqlens is not None:
        excluded = {"attention_mask": attention_mask, "position_ids": position_ids, "cache": cache}
        given = [name for name, value in excluded.items() if value is not None]
        if given or B != 1:
            raise ValueError(
                "cu_seqlens: expected one row (B = 1) without attention_mask, position_ids and "
                f"cache (use_cache=False), got B = {B} and {', '.join(given) or 'none of them'}"
            )
        return TokenLayout.of_packed(T, x_BTD.device, cu_seqlens, max_seqlen)
    if not T:
        raise ValueError(f"input_ids: expected at least one token a row, got shape [{B}, 0]")
    rows = -1 if cache is None else cache.batch_size
    if rows not in (-1, B):
        raise ValueError(
            f"past_key_values: expected a cache of {B} rows, as many as the input has, got {rows}; "
            "batch_repeat_interleave repeats rows, for beams and samples too"
        )
    if attention_mask is not None and tuple(attention_mask.shape) != (B, past + T):
        raise ValueError(
            f"attention_mask: expected shape [B, past+T] = [{B}, {past + T}], got "
            f"{list(attention_mask.shape)}"
        )
    layout = TokenLayout.of_rows(T, x_BTD.device, past=past, attention_mask=attention_mask)
    if position_ids is None:
        return layout
    positions = position_ids.to(x_BTD.device)
    if layout.pads is not None:
        positions = positions.masked_fill(layout.pads, -1)
    return TokenLayout(positions, layout.pads)


class GSAForCausalLM(GSAPreTrainedModel, GSAGenerationMixin):
    """The language model: token ids to the logits of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: GSAConfig):
        super().__init__(config)
        self.model = GSAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def untie_weights(self) -> None:
        """Gives a tied head a copy of its own, which is trained and saved apart from then on."""
        self.config.tie_word_embeddings = False
        self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach().clone())
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GSACache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        loss_only: bool = False,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [B, T, W], and with labels the mean cross-entropy in nats per token.

        Args:
            labels: [B, T], the input ids themselves; the shift happens here; -100 is left out, and
                nothing but -100 gives a loss of 0.
            logits_to_keep: only the logits of the last n tokens, or of the given indices; 0 is all.
            num_items_in_batch: divides the summed loss instead of the number of labels here; for
                gradient accumulation.
            loss_only: with labels, leaves out the logits where they are many, which then are never
                all there at once (`linear_cross_entropy`).
            Others as in `GSAModel.forward`; cu_seqlens does not mask labels at boundaries: the
            first label of each document should be -100.
        """
        if output_attentions:
            raise ValueError(
                "output_attentions: expected False (a slot memory has no attention map)"
            )
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(f"logits_to_keep: expected 0 with labels, got {logits_to_keep!r}")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
        hidden = outputs.last_hidden_state
        many = hidden.shape[:2].numel() * self.vocab_size > CHUNK_LOGITS
        if loss_only and labels is not None and many and type(self.lm_head) is nn.Linear:
            output = CausalLMOutputWithPast(
                loss=next_token_loss_of_hidden(
                    hidden, self.lm_head.weight, labels, num_items_in_batch
                ),
                past_key_values=outputs.past_key_values,
                hidden_states=outputs.hidden_states,
            )
            return output if return_dict is not False else output.to_tuple()
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        output = CausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits, labels, num_items_in_batch),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output if return_dict is not False else output.to_tuple()
