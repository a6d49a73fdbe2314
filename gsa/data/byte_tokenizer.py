"""The byte tokenizer: token ids 0 … 255 are the bytes of the text's UTF-8, two special ids follow.

    0 … 255   the byte itself
    256       <|endoftext|>   ends every document; eos
    257       <|pad|>         fills batches when generating; never in training data

The vocabulary is 258. It is an ordinary `tokenizers` file (a byte-level BPE without a merge), so
`AutoTokenizer.from_pretrained` loads it and no code of ours, local or remote, is needed.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
EOS_ID = 256
PAD_ID = 257
VOCAB_SIZE = 258


def _byte_letters() -> list[str]:
    """The printable letter by which byte-level tokenizers write each byte, in byte order.

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 upwards.
    """
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(256, 512))
    return [chr(byte if byte in itself else next(substitutes)) for byte in range(256)]


def build_byte_tokenizer() -> Tokenizer:
    """The byte tokenizer as a `tokenizers.Tokenizer`."""
    letters = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    # Without the regex nothing is split and no space is added: text in is bytes out.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore[reportAttributeAccessIssue]
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = [
        AddedToken(token, special=True, normalized=False) for token in (EOS_TOKEN, PAD_TOKEN)
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer


def save_byte_tokenizer(folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`, for `AutoTokenizer`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_byte_tokenizer().to_str(pretty=True)
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TOKEN,
        "pad_token": PAD_TOKEN,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def decode_bytes(ids: Iterable[int]) -> bytes:
    """The exact bytes of byte-token ids; special ids give nothing.

    `tokenizer.decode` returns a str, where bytes that are not UTF-8 (a model may write any) become
    U+FFFD. This is the decoding that loses nothing. ValueError for an id outside 0 … 257.
    """
    kept = bytearray()
    for token in ids:
        if not 0 <= token < VOCAB_SIZE:
            raise ValueError(f"ids: expected byte-token ids 0 … {VOCAB_SIZE - 1}, got {token}")
        if token < 256:
            kept.append(token)
    return bytes(kept)
