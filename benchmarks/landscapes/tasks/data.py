"""Loads the JSONL files beside the task files, wherever lm-eval is started from."""

from pathlib import Path
from typing import Any

import datasets


def load(file: str, **_: Any) -> datasets.DatasetDict:
    """The rows of one file as the split `test`."""
    rows = datasets.Dataset.from_json(str(Path(__file__).parent / file))
    return datasets.DatasetDict({"test": rows})
