"""Teachers: transformers models of each family with random weights, saved as a hub has them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 320
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    bos_token_id=0,
    eos_token_id=1,
)
LESSON = SIZES | dict(initializer_range=0.15)
"""A teacher to learn from, whose next tokens are not all but certain."""
ROW = 32
"""Tokens of a row, when it is learned from."""
LLAMA3 = dict(rope_type="llama3", rope_theta=5e3, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=32)
LINEAR = dict(rope_type="linear", rope_theta=1e3, factor=4.0)

YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)

TEACHERS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama 3": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3, rms_norm_eps=1e-5),
    "smollm2": lambda: LlamaConfig(
        **SIZES | dict(num_attention_heads=3, num_key_value_heads=1), tie_word_embeddings=True
    ),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=7, head_dim=10),
    "mistral without a window": lambda: MistralConfig(
        **SIZES, sliding_window=None, rope_parameters=LINEAR
    ),
    "qwen2": lambda: Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=2
    ),
    "qwen2 with yarn": lambda: Qwen2Config(**SIZES | dict(hidden_size=64), rope_parameters=YARN),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True),
}


def build_model(config, seed=0):
    """A model whose every weight counts: no bias is 0 and no norm's weight 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    return model


def build_tokenizer(vocab_size=VOCAB):
    """A byte-pair tokenizer, trained for the occasion."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    text = ["the slot forgets what the gate lets go, and remembers the rest of all that was read"]
    tokenizer.train_from_iterator(text * 4, trainer)
    chat = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=chat
    )
