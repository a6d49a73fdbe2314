"""Tasks that lm-eval lacks: recall in the protocol of JRT, and long contexts.

JRT ("Just read twice", arXiv 2407.05483) asks a model to go on with a document and a cloze, cuts
long documents to a window around the answer, and counts an answer that contains the right one.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lm_eval.api.task import ConfigurableTask

Row = Mapping[str, Any]
SPARE = 2
"""Tokens left between a prompt with its answer and the length: joined text may tokenize longer."""


@dataclass(frozen=True)
class Prompt:
    """A question about a document; the model goes on after `document + question`.

    around: the document is cut to a window around the first of the answers, else at its end.
    """

    document: str
    question: str
    answers: tuple[str, ...]
    around: bool = False


def key_and_value(row: Row) -> Prompt:
    """FDA and SWDE: text, key, value. The cloze is the key, with a capital letter."""
    text, key = row["text"].split("Summary of information above...")[0], row["key"]
    document = _sentence(_without(text, f"{key}:"))
    return Prompt(document, f" {key[:1].upper()}{key[1:]}:", (row["value"],), around=True)


def cloze(row: Row) -> Prompt:
    """SQuAD: text, which breaks off before the value. Its last line is the cloze."""
    document, line, question = row["text"].strip().rpartition("\n")
    return Prompt(document, line + question, (row["value"],), around=True)


def question_after_context(row: Row, *, around: bool) -> Prompt:
    """NQ, TriviaQA, DROP: context, a question in the form of a cloze, answers."""
    context = re.sub(r"\[(PAR|DOC|TLE)\]", "", row["context"])
    question = row["question"].strip()
    document = _sentence(_without(context, question))
    return Prompt(document, f" {question}", _answers(row), around)


def question_about(row: Row) -> Prompt:
    """Qasper, NarrativeQA, QMSum: context, question, answers."""
    question = f"\n\nQuestion: {row['question'].strip()}\nAnswer:"
    return Prompt(row["context"].strip(), question, _answers(row))


def choice_about(row: Row) -> Prompt:
    """QuALITY: article, question, options, and answer, the place of the right one from 0."""
    question = f"\n\nQuestion: {row['question'].strip()}\nAnswer:"
    return Prompt(row["article"].strip(), question, (row["options"][row["answer"]],))


def _answers(row: Row) -> tuple[str, ...]:
    if isinstance(row["answers"], str):  # else each of its letters would be an answer
        raise TypeError(f"answers: expected a list of texts, got {row['answers']!r}")
    return tuple(row["answers"])


def _without(text: str, ending: str) -> str:
    """The text without what it asks at its end, however often."""
    text = text.strip()
    while ending and text.lower().endswith(ending.lower()):
        text = text[: -len(ending)].strip()
    return text


def _sentence(text: str) -> str:
    return text.strip().strip(".").strip() + "."


def cut(prompt: Prompt, tokenizer: Any, most: int) -> str:
    """The prompt as text, its document cut so that all are about `most` tokens.

    ValueError if there is no room for a document.
    """
    room = most - SPARE - len(tokenizer.encode(prompt.question))
    if room < 1:
        raise ValueError(
            f"length: expected at least {1 - room} more: with its question and its answer, a task "
            "leaves no token for the document"
        )
    said = tokenizer(prompt.document, return_offsets_mapping=True, add_special_tokens=False)
    places = said["offset_mapping"]
    if len(places) <= room:
        return prompt.document + prompt.question
    first = 0
    if prompt.around:
        text = prompt.document.lower()
        starts = [text.find(answer.lower()) for answer in prompt.answers if answer]
        found = [start for start in starts if start >= 0]
        if found:
            token = next(i for i, (_, end) in enumerate(places) if end > min(found))
            first = min(max(token - room // 2, 0), len(places) - room)
    return prompt.document[places[first][0] : places[first + room - 1][1]] + prompt.question


def contains(answer: str, right: Sequence[str]) -> float:
    """1 if the answer has one of the right ones in it, in whatever case."""
    return float(any(one and one.lower() in answer.lower() for one in right))


def f1(answer: str, right: Sequence[str]) -> float:
    """The best F1 of words, as in SQuAD: without case, punctuation and articles."""
    return max((_f1(_words(answer), _words(one)) for one in right), default=0.0)


def _words(text: str) -> list[str]:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def _f1(found: list[str], right: list[str]) -> float:
    if not found or not right:
        return float(found == right)
    same = sum((Counter(found) & Counter(right)).values())
    return 2 * same / (len(found) + len(right))


def rouge(answer: str, right: Sequence[str]) -> float:
    """The best geometric mean of ROUGE-1, ROUGE-2 and ROUGE-L, as in SCROLLS (arXiv 2201.03533)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=True)
    means = []
    for one in right:
        one_two_long = [part.fmeasure for part in scorer.score(one, answer).values()]
        means.append((one_two_long[0] * one_two_long[1] * one_two_long[2]) ** (1 / 3))
    return max(means, default=0.0)


METRICS = {"contains": contains, "f1": f1, "rouge": rouge}


@dataclass(frozen=True)
class OwnTask:
    """A task of ours: where its rows are, and what they ask.

    hub: a dataset's name and configuration on the Hugging Face hub; it has the keys that `ask`
        documents, and so have local files.
    metric: of written answers; "acc" where options are scored.
    """

    hub: tuple[str, str | None]
    split: str
    ask: Callable[[Row], Prompt]
    metric: str
    max_new_tokens: int = 48

    @property
    def version(self) -> float:
        return 1.0


centred = partial(question_after_context, around=True)
headed = partial(question_after_context, around=False)

OWN_TASKS = {
    "recall_fda": OwnTask(
        ("hazyresearch/based-fda", "default"), "validation", key_and_value, "contains"
    ),
    "recall_swde": OwnTask(
        ("hazyresearch/based-swde-v2", "default"), "validation", key_and_value, "contains"
    ),
    "recall_squad": OwnTask(
        ("hazyresearch/based-squad", "default"), "validation", cloze, "contains"
    ),
    "recall_nq": OwnTask(("hazyresearch/based_nq_2048", None), "validation", centred, "contains"),
    "recall_triviaqa": OwnTask(
        ("hazyresearch/based_triviaqa", None), "validation", headed, "contains"
    ),
    "recall_drop": OwnTask(("hazyresearch/based_drop", None), "validation", headed, "contains"),
    "long_qasper": OwnTask(("Xnhyacinth/LongBench", "qasper"), "test", question_about, "f1", 128),
    "long_narrativeqa": OwnTask(
        ("Xnhyacinth/LongBench", "narrativeqa"), "test", question_about, "f1", 128
    ),
    "long_qmsum": OwnTask(("Xnhyacinth/LongBench", "qmsum"), "test", question_about, "rouge", 512),
    "long_quality": OwnTask(("emozilla/quality", None), "validation", choice_about, "acc", 128),
}


def build_own(name: str, rows: Sequence[Row], tokenizer: Any, length: int) -> ConfigurableTask:
    """A task of ours as lm-eval runs it, prompts and answers fitting into `length` tokens.

    ValueError for rows without the keys that they should have.
    """
    import datasets

    task, docs = OWN_TASKS[name], []
    for number, row in enumerate(rows, start=1):
        try:
            prompt = task.ask(row)
            if not all(isinstance(one, str) for one in prompt.answers):
                raise TypeError(f"answers: expected texts, got {prompt.answers}")
            doc = {"prompt": cut(prompt, tokenizer, length - task.max_new_tokens)}
            doc |= {"answers": list(prompt.answers)}
            doc |= {"options": row["options"], "right": row["answer"]} if _chooses(task) else {}
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            about = " ".join((_docs(task) or "").split())
            raise ValueError(
                f"{name}, row {number}: expected rows as for {about} Got {error!r}"
            ) from error
        docs.append(doc)
    if not docs:
        raise ValueError(f"{name}: expected at least one row, got none")
    dataset = {task.split: datasets.Dataset.from_list(docs)}
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda version: dataset,
        "test_split": task.split,
        "num_fewshot": 0,
        "doc_to_text": lambda doc: doc["prompt"],
        "metric_list": [{"metric": task.metric, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": task.version},
    }
    if _chooses(task):
        config |= {"output_type": "multiple_choice", "doc_to_choice": lambda doc: doc["options"]}
        config["doc_to_target"] = lambda doc: doc["right"]
    else:
        measure = METRICS[task.metric]
        config |= {
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": task.max_new_tokens},
            "doc_to_target": lambda doc: (doc["answers"] or [""])[0],
            "process_results": lambda doc, found: {task.metric: measure(found[0], doc["answers"])},
        }
    return ConfigurableTask(config=config)


def _chooses(task: OwnTask) -> bool:
    return task.metric == "acc"


def _docs(task: OwnTask) -> str | None:
    function = task.ask.func if isinstance(task.ask, partial) else task.ask
    return function.__doc__
