"""A few rows of the tasks that suites ask for, as files for --data-dir."""

import json

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


def write_tasks(folder):
    """Writes all of LOCAL into a folder for --data-dir, and returns it."""
    for task, splits in LOCAL.items():
        (folder / task).mkdir(parents=True)
        for split, rows in splits.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / task / f"{split}.jsonl").write_text(text)
    return folder
