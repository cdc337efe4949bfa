"""The figures of the documentation come from committed data: every table is what its command prints."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.workspace import Workspace

ROOT = Path(__file__).parents[1]


def documents(*words: str) -> subprocess.CompletedProcess[str]:
    """What `benchmarks/documents.py` does with these arguments."""
    command = [sys.executable, str(ROOT / "benchmarks" / "documents.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def block(command: str, body: str = "") -> str:
    return f"Before.\n\n<!-- from: {command} -->\n{body}<!-- end -->\n\nAfter.\n"


@pytest.mark.slow
def test_every_table_of_the_documentation_is_what_its_command_prints_from_its_data() -> None:
    done = documents("--check")
    assert done.returncode == 0, f"`python benchmarks/documents.py` writes the tables anew:\n{done.stdout}{done.stderr}"


def test_every_figure_of_the_readme_comes_from_data() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- from: ") == text.count("<!-- end -->") == 2
    done = documents("--check", str(ROOT / "README.md"))
    assert done.returncode == 0, done.stdout
    prose = re.sub(r"<!-- from.*?<!-- end -->|```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.S)
    assert re.findall(r"\d+\.\d+|\d+ ?%|±", prose) == ["3.11", "3.11", "2.0"]  # of Python, and of the licence


def test_the_picture_of_the_readme_shows_the_log_of_a_benchmark(workspace: Workspace) -> None:
    log = ROOT / "benchmarks" / "results" / "quickstart-llm" / "seed-0.jsonl"
    assert workspace.llmevo("replay", log, "--picture", "made.svg")[0] == 0
    made = (workspace.root / "made.svg").read_text()
    there = (ROOT / "docs" / "display.svg").read_text()
    shown = [re.findall(r"\d\.\d{3}", " ".join(re.findall(r">([^<]+)</text>", text))) for text in (made, there)]
    assert shown[0] == shown[1], "benchmarks/results/data.md has the command of docs/display.svg"
    assert len(shown[0]) > 50


def test_every_file_of_results_has_its_origin() -> None:
    folder = ROOT / "benchmarks" / "results"
    told = (folder / "data.md").read_text()
    for file in folder.glob("*.jsonl"):
        assert f"`{file.name}`" in told, f"data.md: say how {file.name} was made"


COVERAGE = "optimizers.py coverage benchmarks/results/optimizers-bbob.jsonl"


def test_a_changed_figure_is_an_error_and_is_written_anew_from_the_data(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(block(COVERAGE))
    assert documents(str(file)).returncode == 0
    text = file.read_text()
    assert "| mergekit-evolve | 10, 20, 40 | 15 × 24 | 15 × 24 |" in text
    file.write_text(text.replace("15 × 24", "16 × 24", 1))
    changed = documents("--check", str(file))
    assert changed.returncode == 1
    assert "16 × 24" in changed.stdout
    assert documents(str(file)).returncode == 0
    assert file.read_text() == text


def test_where_the_data_are_missing_no_table_may_stand(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    command = "tables.py benchmarks/results/of-nothing.jsonl"
    file.write_text(block(command))
    assert documents("--check", str(file)).returncode == 0
    file.write_text(block(command, "| a | b |\n|---|---|\n| speed | 1 |\n"))
    assert documents("--check", str(file)).returncode == 1


def test_a_table_of_the_readme_with_a_measured_number_but_no_data_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("| a | b |\n|---|---|\n| speed | 1.7 s |\n")
    done = documents("--check", str(file))
    assert done.returncode == 1
    assert "without data: | speed | 1.7 s |" in done.stdout
    file.write_text("| a | b |\n|---|---|\n| key | a number |\n")
    assert documents("--check", str(file)).returncode == 0
