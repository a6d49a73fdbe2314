"""Folders of tiny models with the byte tokenizer."""

import json

import pytest
from tiny_models import VARIANTS, build_tiny

from gsa.data.byte_tokenizer import EOS_ID, VOCAB_SIZE, save_byte_tokenizer


@pytest.fixture
def save_model(tmp_path):
    """Saves a tiny model of a variant of `VARIANTS`; returns its folder."""

    def save(variant="paper", **changes):
        folder = tmp_path / variant
        sizes = {"vocab_size": VOCAB_SIZE, "eos_token_id": EOS_ID, "max_position_embeddings": 64}
        model = build_tiny(**(VARIANTS[variant] | sizes | changes))
        model.save_pretrained(folder)
        save_byte_tokenizer(folder)
        return folder

    return save


ARC = {
    "question": "What does a slot keep?",
    "choices": {"text": ["all", "what it must", "nothing"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
LOCAL = {
    "arc_easy": {"test": [ARC, ARC | {"answerKey": "A"}]},
    "arc_challenge": {"test": [ARC]},
    "lambada_openai": {"test": [{"text": "The gate lets go of what the slot keeps"}]},
    "wikitext": {"test": [{"page": " = Slot = \n A slot forgets , and it remembers . "}]},
    "hellaswag": {
        "validation": [
            {
                "ctx_a": "A gate opens.",
                "ctx_b": "the slot",
                "activity_label": "Reading",
                "endings": ["forgets.", "sings.", "waits.", "burns."],
                "label": "0",
                "ind": 1,
            }
        ]
    },
    "piqa": {"validation": [{"goal": "Forget", "sol1": "Close", "sol2": "Open", "label": 1}]},
    "winogrande": {
        "validation": [
            {
                "sentence": "The slot kept it since the _ was shut.",
                "option1": "gate",
                "option2": "slot",
                "answer": "1",
            }
        ]
    },
    "recall_fda": {
        "validation": [
            {"key": "device", "value": "slot", "text": "The device is a slot. device:"},
            {"key": "maker", "value": "Gate Inc", "text": "x y. " * 60 + "By Gate Inc. maker:"},
        ]
    },
    "long_quality": {
        "validation": [
            {"article": "A b c. " * 40, "question": "Which?", "options": ["b", "z"], "answer": 0}
        ]
    },
    "mmlu_anatomy": {
        "test": [{"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 3}] * 2,
        "dev": [{"question": "Who?", "choices": ["a", "b", "c", "d"], "answer": 1}] * 5,
    },
    "nq_open": {"validation": [{"question": "who forgets", "answer": ["slot"]}]},
}
"""Rows by task and split, with the keys that the tasks read."""


@pytest.fixture
def data_dir(tmp_path):
    """A folder for --data-dir with all of `LOCAL`."""
    for task, splits in LOCAL.items():
        folder = tmp_path / "local" / task
        folder.mkdir(parents=True)
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    return tmp_path / "local"
