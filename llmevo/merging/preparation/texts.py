"""The texts on which a preparation measures the inputs of linear layers."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from llmevo.errors import RecipeError, nearest
from llmevo.models.files import cache_folder, kept_file

FILE = "prepare-{digest}.json"
"""The name of the texts that a run takes from its search questions."""


@dataclass(frozen=True)
class Texts:
    """Texts by task."""

    tasks: Mapping[str, Sequence[str]]

    @property
    def all(self) -> list[str]:
        return [text for texts in self.tasks.values() for text in texts]

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.all).encode()).hexdigest()

    def check(self, tasks: Sequence[str], called: str) -> None:
        """Raise RecipeError for a task that is unknown or has no text. `called` is what messages call them."""
        if unknown := next((task for task in tasks if task not in self.tasks), None):
            raise RecipeError(f"prepare.tasks: {called} has no task {unknown!r}{nearest(unknown, self.tasks)}")
        if self.all and (empty := next((task for task in tasks if not self.tasks[task]), None)):
            raise RecipeError(f"prepare.tasks: {called} has no text of the task {empty!r}; add some, or leave it out")

    def of(self, tasks: Sequence[str]) -> "Texts":
        """Return those of some tasks. Raises KeyError."""
        return Texts({task: self.tasks[task] for task in tasks})

    def to_json(self) -> str:
        return json.dumps(self.tasks, indent=1, ensure_ascii=False) + "\n"

    def keep(self) -> str:
        """Write them to the cache folder, and return the name under which a recipe names them. Raises SourceError."""
        content = self.to_json().encode()
        return kept_file("texts", FILE.format(digest=hashlib.sha256(content).hexdigest()[:16]), content).name


KEY = "prepare.text"
"""The key of configs and recipes that names a file of texts."""


def called(name: str) -> str:
    """Return how messages call the texts of a recipe: by the user's file, or as a run's search questions."""
    return "the search questions" if re.fullmatch(FILE.format(digest=r"[0-9a-f]{16}"), name) else name


def read_texts(name: str, root: Path, key: str = KEY) -> Texts:
    """Read the texts of a recipe: a JSON object {task: [text, …]}, JSON Lines with `text`, or a text a line.

    `name` is a file relative to `root`, or one that `Texts.keep` wrote; errors say that `key` names it. Raises
    RecipeError.
    """
    file = next((f for f in (root / name, cache_folder() / "texts" / name) if f.is_file()), root / name)
    try:
        content = file.read_text(encoding="utf-8")
        lines = content.splitlines()
        if file.suffix == ".jsonl":
            lines = [_text_of(line, place, file, key) for place, line in enumerate(lines, 1) if line.strip()]
        tasks = json.loads(content) if file.suffix == ".json" else {file.stem: lines}
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        again = "; `llmevo export RUN` makes that of a run again" if key == KEY else ""
        raise RecipeError(
            f"{key}: {file} cannot be read ({reason}); it is a JSON file {{task: [text, …]}}, JSON Lines"
            f' with "text", or a file with a text a line{again}'
        ) from error
    if not isinstance(tasks, dict) or not all(_is_texts(texts) for texts in cast(dict[str, object], tasks).values()):
        raise RecipeError(f"{key}: {file} is no JSON object {{task: [text, …]}}")
    kept = {task: [text for text in texts if text.strip()] for task, texts in cast(dict[str, list[str]], tasks).items()}
    if not any(kept.values()):
        raise RecipeError(f"{key}: {file} has no text")
    return Texts(kept)


def _text_of(line: str, place: int, file: Path, key: str) -> str:
    """Return the text of a line of a .jsonl file."""
    content: Any = json.loads(line)
    found = content.get("text") if isinstance(content, dict) else content
    if not isinstance(found, str):
        raise RecipeError(f'{key}: {file}, line {place}: it has no text; write {{"text": "…"}}, or the text in quotes')
    return found


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in cast(list[object], value))
