"""What explains, or reads a run, starts without the libraries that only scoring needs."""

import subprocess
import sys

from workspace import Workspace

HEAVY = ("transformers", "lm_eval", "datasets", "openai", "matplotlib", "optuna")
CODE = """
import sys
from llmevo import cli
for words in {commands!r}:
    sys.argv = ["llmevo", *words]
    try:
        cli.main()
    except SystemExit as left:
        assert not left.code, words
    loaded = [name for name in {heavy!r} if name in sys.modules]
    assert not loaded, (words, loaded)
"""


def test_what_reads_a_run_loads_no_library_that_only_scoring_needs(workspace: Workspace) -> None:
    config = workspace.config(search={"optimizer": "llm-off", "budget": 9}, engine={"self_check": False})
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    commands = [
        ["--help"],
        ["--version"],
        ["status", "run"],
        ["replay", "run"],
        ["replay", "run", "--verify"],
        ["report", "run"],
    ]
    code = CODE.format(commands=commands, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert "held-out" in done.stdout
