"""A folder as a user has it: three tiny models, two tasks of their own and a config."""

import fcntl
import hashlib
import json
import shutil
import sys
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmevo.cli.app import main
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import read_log, trust
from support.tiny_model import save_tiny

CHOICE = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@dataclass
class Workspace:
    """The folder, and the command line started in it."""

    root: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    library: Path
    """The finished runs, shared by all tests."""

    def config(self, **changes: Any) -> Path:
        """Write config.yml; `changes` replace top-level keys, None removes one."""
        values: dict[str, Any] = {
            "genome": {
                "base_model": "base",
                "models": ["one", "two"],
                "merge_method": "task_arithmetic",
                "layer_granularity": 1,
                "dtype": "float32",
            },
            "tasks": [{"name": "letters", "weight": 1.0}],
            "heldout": ["letters_heldout"],
            "apply_chat_template": False,
            "task_search_path": ["tasks"],
            "search": {"optimizer": "llm", "budget": 9, "population": 3, "seed": 3},
            "llm": {"proposer": "local"},
            **changes,
        }
        file = self.root / "config.yml"
        file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return file

    def llmevo(self, *words: object) -> tuple[int, str]:
        """The exit status and everything printed."""
        status, out, messages = self.printed(*words)
        return status, out + messages

    def printed(self, *words: object) -> tuple[int, str, str]:
        """The exit status, the standard output and the standard error of a command."""
        self.monkeypatch.setattr(sys, "argv", ["llmevo", *map(str, words)])
        try:
            main()
            status = 0
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
        printed = self.capsys.readouterr()
        return status, printed.out, printed.err

    def finished(self, *options: object, out: str = "run", **changes: Any) -> str:
        """Put a finished run of `config(**changes)` into the folder `out`; return the text that `llmevo run` printed.

        Equal runs over equal workspaces are made once for all tests, in a copy of the workspace. Use it where the run
        is an input, and before anything of `llmevo` is replaced.
        """
        self.config(**changes)
        digest = hashlib.sha256(json.dumps([*map(str, options)]).encode())
        for file in sorted(self.root.rglob("*")):
            if file.is_file():
                digest.update(str(file.relative_to(self.root)).encode() + moved(file, self.root, Path("/")))
        place = self.library / digest.hexdigest()[:16]
        with place.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place / "printed").exists():
                copy(self.root, place, self.root, place)
                with chdir(place):
                    status, printed = self.llmevo("run", place / "config.yml", "--out", "run", *options)
                assert status == 0, printed
                (place / "printed").write_text(printed)
        copy(place / "run", self.root / out, place, self.root)
        trust(self.root / out)
        return moved(place / "printed", place, self.root).decode()

    def events(self, run: str) -> list[events.Event]:
        return read_log(self.root / run)

    def state(self, run: str) -> RunState:
        return RunState.fold(iter(self.events(run)))


def moved(file: Path, root: Path, target: Path) -> bytes:
    """The content of a file, with the path `target` where it has the path `root`."""
    return file.read_bytes().replace(str(root).encode(), str(target).encode())


def copy(source: Path, folder: Path, root: Path, target: Path) -> None:
    """Copy a folder, with the path `target` where its files have the path `root`."""
    for file in source.rglob("*"):
        if file.is_file():
            copied = folder / file.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(moved(file, root, target))


def write_task(root: Path, name: str, shift: int, size: int = 12) -> None:
    """A multiple-choice task over single letters; different shifts ask different questions."""
    folder = root / "tasks"
    folder.mkdir(exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [
        {
            "question": letters[i : i + 3 + shift],
            "choices": [f" {letters[(i * 7 + k * 5) % 26]}" for k in range(4)],
            "answer": i % 4,
        }
        for i in range(size)
    ]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(CHOICE.format(task=name, file=file))


def write_questions(root: Path, models: Path) -> None:
    """The same models, and enough questions for racing."""
    shutil.copytree(models, root, dirs_exist_ok=True)
    for name, size in (("letters", 60), ("letters_heldout", 20)):
        write_task(root, name, 0)
        rows = [{"question": f"{name} {n}", "choices": ["a", "b"], "answer": n % 2} for n in range(size)]
        (root / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def new_workspace(root: Path) -> None:
    """Models and tasks; made once and copied."""
    for seed, name in enumerate(("base", "one", "two")):
        save_tiny(root / name, seed, tied=True)
    write_task(root, "letters", 0)
    write_task(root, "letters_heldout", 1)
