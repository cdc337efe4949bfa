"""A comparison as files: numbers, picture and text."""

import json
from pathlib import Path

from llmevo.models.files import write_whole
from llmevo.reports.comparison.chart import draw
from llmevo.reports.comparison.compare import Comparison
from llmevo.reports.comparison.tables import markdown

NAME = "comparison"


def publish(comparison: Comparison, out: Path) -> None:
    """Write comparison.json, comparison.png and comparison.md; each is there as a whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / f"{NAME}.json", (json.dumps(comparison.as_dict(), indent=1, allow_nan=False) + "\n").encode())
    write_whole(out / f"{NAME}.png", draw(comparison))
    write_whole(out / f"{NAME}.md", markdown(comparison, f"{NAME}.png").encode())
