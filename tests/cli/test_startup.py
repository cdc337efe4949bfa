"""What explains, or reads a run, starts without the libraries that only merging and scoring need."""

import shutil
import subprocess
import sys
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden" / "0.1-llm-off.jsonl"
HEAVY = (
    "torch",
    "numba",
    "transformers",
    "lm_eval",
    "datasets",
    "openai",
    "huggingface_hub",
    "matplotlib",
    "optuna",
    "py3langid",
)
WEIGHING = ("sklearn",)
"""Only the report's own estimates need it."""
COMMANDS = (
    ["--help"],
    ["--version"],
    ["run", "--help"],
    ["status", "run"],
    ["replay", "run"],
    ["replay", "run", "--verify"],
    ["report", "run"],
)
CODE = f"""
import sys
from pathlib import Path
from llmevo.cli import app as cli
def check(words):
    loaded = [name for name in {HEAVY!r} + {WEIGHING!r} * (words[0] != "report") if name in sys.modules]
    assert not loaded, (words, loaded)
check(["import"])
for words in {COMMANDS!r}:
    sys.argv = ["llmevo", *words]
    try:
        cli.main()
    except SystemExit as left:
        assert not left.code, words
    check(words)
from llmevo.reports.web import server
from llmevo.reports.web.followed import Runs
assert b"<h1>run</h1>" in Runs(Path("run"), print).runs[0].page()
check(["report"])
"""


def test_what_explains_or_reads_a_run_loads_no_library_that_only_scoring_needs(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(GOLDEN, tmp_path / "run" / "events.jsonl")
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert "held-out" in done.stdout
