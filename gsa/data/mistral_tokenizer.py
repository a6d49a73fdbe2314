"""Mistral-7B's first tokenizer, 32,000 tokens: the paper's, from the `mistral-common` package.

The package carries the SentencePiece model as a file; nothing is downloaded. What is built from it
is an ordinary `tokenizers` file, so that `AutoTokenizer` loads it from a shard or model folder
without either package. Ids: 0 <unk>, 1 <s>, 2 </s>, 3 … 258 the bytes, then pieces.
"""

import importlib.util
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

MODEL = "data/tokenizer.model.v1"
UNK_TOKEN, BOS_TOKEN, EOS_TOKEN = "<unk>", "<s>", "</s>"
_SPACE = "▁"


def mistral_model_file() -> Path:
    """The SentencePiece model's file; ImportError saying what to install if it is not here."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or importlib.util.find_spec("sentencepiece") is None:
        raise ImportError(
            "tokenizer: mistral needs the packages mistral-common and sentencepiece; "
            "pip install 'gated-slots[mistral]'"
        )
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / MODEL


def build_mistral_tokenizer() -> Tokenizer:
    """The tokenizer as a `tokenizers.Tokenizer`, ids equal to SentencePiece's."""
    path = mistral_model_file()
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(path))
    vocabulary = {pieces.IdToPiece(i): i for i in range(pieces.vocab_size())}
    scores = {
        piece: pieces.GetScore(i)
        for piece, i in vocabulary.items()
        if not (pieces.IsControl(i) or pieces.IsUnknown(i) or pieces.IsByte(i))
    }
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(scores),
        unk_token=UNK_TOKEN,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in (UNK_TOKEN, BOS_TOKEN, EOS_TOKEN)
        ]
    )
    return tokenizer


def load_mistral_tokenizer():
    """The tokenizer as transformers has it; no token is put before or after a text."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=build_mistral_tokenizer(),
        unk_token=UNK_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the best piece first."""
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((left, right))
    return merges
