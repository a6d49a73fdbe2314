"""The teacher's tokenizer: whether it fits, and its files taken over."""

import shutil
from pathlib import Path

from gsa.conversion.teacher import Teacher
from gsa.data.encoding import DEFINITIONS, load_tokenizer

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)


def tokenizer_files(teacher: Teacher) -> list[str]:
    """Names of the tokenizer's files in the teacher's folder, none if it has no tokenizer.

    ValueError if it cannot be loaded or has tokens beyond the teacher's vocabulary.
    """
    found = [name for name in FILES if (teacher.folder / name).is_file()]
    if not set(found) & set(DEFINITIONS):
        return []
    tokenizer = load_tokenizer(teacher.folder)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    vocab_size = teacher.config.vocab_size
    if highest >= vocab_size:
        raise ValueError(
            f"teacher: expected a tokenizer with tokens below vocab_size = {vocab_size}, got token "
            f"{highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) in {teacher.folder}: it is "
            "another model's, or tokens were added to it and not to the model"
        )
    return found


def take_over_tokenizer(teacher: Teacher, files: list[str], folder: Path) -> None:
    """Copies the tokenizer's files into a folder with the student's config.

    Where they say nothing about their class and the teacher's model_type did, the loaded tokenizer
    is written anew, since the student's would not.
    """
    if not files:
        return
    for name in files:
        shutil.copyfile(teacher.folder / name, folder / name)
    wanted = load_tokenizer(teacher.folder)
    try:
        found = load_tokenizer(folder)
    except ValueError:
        found = None
    if found is None or found.get_vocab() != wanted.get_vocab():
        for name in files:
            (folder / name).unlink()
        wanted.save_pretrained(folder)
