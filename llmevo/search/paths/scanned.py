"""Reading a scan: the effects of single edits, which `llmevo scan` wrote."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmevo.errors import ConfigError

FILE = "scan.jsonl"
"""The file of a scan in its folder."""

Scanned = Mapping[str, tuple[float, float]]
"""{path of a single edit: its effect on the probability of right answers, and the standard error}."""


def read_scan(given: Path, root: Path) -> Scanned:
    """Return the effects in a scan's folder or file. Raises ConfigError for a file that is no scan, or an empty one."""
    file = root / given
    file = file / FILE if file.is_dir() else file
    found: dict[str, tuple[float, float]] = {}
    try:
        rows: list[Any] = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            if row.get("kind", "model") != "model" and row.get("score") is not None:
                effect, stderr = float(row["effect"]), float(row["stderr"])
                if math.isfinite(effect) and math.isfinite(stderr):
                    found[str(row["path"])] = effect, stderr
    except OSError as error:
        raise ConfigError(f"genome.path.scan: {file} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"genome.path.scan: {file} is no scan ({error!r}); give what `llmevo scan` wrote") from error
    if not found:
        raise ConfigError(f"genome.path.scan: {file} has no measured edit; run `llmevo scan` to its end")
    return found
