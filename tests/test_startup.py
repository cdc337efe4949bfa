"""What reads or explains starts without the libraries that only scoring needs."""

import subprocess
import sys

import pytest

HEAVY = ("transformers", "lm_eval", "datasets", "openai", "matplotlib", "sklearn", "optuna")
CODE = """
import sys
from llmevo import cli
sys.argv = ["llmevo", *{words!r}]
try:
    cli.main()
finally:
    print("loaded:", *(name for name in {heavy!r} if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("words", [["--help"]], ids=" ".join)
def test_help_loads_no_library_that_only_scoring_needs(words: list[str]) -> None:
    code = CODE.format(words=words, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stderr.strip() == "loaded:"
