"""The import order of the design holds, and importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llmevo

PACKAGE = Path(llmevo.__file__).parent
ORDER = [
    "errors",
    "strict_yaml",
    "machine",
    "plurals",
    "durable",
    "cache",
    "methods",
    "settings",
    "longhand",
    "references",
    "checksums",
    "slices",
    "recipe",
    "provenance",
    "planning",
    "genome",
    "genes",
    "decoding",
    "space",
    "trial",
    "aims",
    "budget",
    "prompting",
    "optimizers",
    "proposers",
    "sources",
    "merging",
    "geometry",
    "encoding",
    "shards",
    "vocabulary",
    "writing",
    "engines",
    "selfcheck",
    "judging",
    "tasks",
    "questions",
    "standard_errors",
    "racing",
    "proxy",
    "weighing",
    "evaluation",
    "heat",
    "languages",
    "gate",
    "loggers",
    "peers",
    "mistakes",
    "schema",
    "config",
    "events",
    "changes",
    "state",
    "runlog",
    "rig",
    "preflight",
    "versions",
    "bench",
    "trust",
    "journal",
    "forwarding",
    "dialogue",
    "sizes",
    "sums",
    "finals",
    "loop",
    "resuming",
    "verifying",
    "rescoring",
    "what_if",
    "sharing",
    "export",
    "hub",
    "statistics",
    "results",
    "compare",
    "tables",
    "drawing",
    "publication",
    "tournament",
    "progress",
    "picture",
    "display",
    "playing",
    "watching",
    "status",
    "scoreboard",
    "report",
    "forecast",
    "heatmap",
    "inspection",
    "sections",
    "options",
    "terminal",
    "commands",
    "cli",
    "__main__",
]
"""Each module may import only what stands above it."""


def module_of(name: str) -> str:
    """The part of the design a dotted name belongs to: `llmevo.methods.ties` is of `methods`."""
    return name.split(".")[1] if "." in name else ""


def imports_of(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {module_of(alias.name) for alias in node.names if alias.name.startswith("llmevo.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "llmevo":
            found |= {alias.name for alias in node.names if alias.name in ORDER}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmevo."):
            found.add(module_of(node.module))
    return found


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_above_it(file: Path) -> None:
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    upward = {name for name in imports_of(file) - {own} if ORDER.index(name) > ORDER.index(own)}
    assert not upward, f"{own} must not import {upward}"


def test_importing_prints_nothing_and_opens_no_model() -> None:
    code = "import llmevo, llmevo.errors, llmevo.methods, llmevo.genome; import sys; assert 'vllm' not in sys.modules"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
