"""Small lm-eval tasks."""

import json
from pathlib import Path
from typing import Any

from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.tasks.task import Task

ROWS: list[dict[str, Any]] = [
    {"question": f"{a} + {b} =", "choices": [str(a + b), "7", "no"], "answer": 0} for a in range(4) for b in range(5)
]

MULTIPLE_CHOICE: dict[str, Any] = {
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1},
}
GENERATION: dict[str, Any] = {
    **MULTIPLE_CHOICE,
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def add_task(folder: Path, name: str, rows: list[dict[str, Any]] | None = None, **config: Any) -> Task:
    """A task file and its questions in a folder."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)))
    made = {**MULTIPLE_CHOICE, **config, "task": name, "dataset_path": "json"}
    made["dataset_kwargs"] = {"data_files": {"test": str(data)}}
    (folder / f"{name}.yaml").write_text(json.dumps({key: value for key, value in made.items() if value is not None}))
    return Task(name=name)


def asked(scoring: Evaluator) -> list[str]:
    """The questions of an evaluator, in their order."""
    return [text for _, text in scoring.questions()]
