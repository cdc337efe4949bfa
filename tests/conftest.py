"""Fixtures, what the markers need, and the state every test starts from: no network, no key, one thread."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DATASETS_VERBOSITY"] = "error"  # as the command line has it
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.pop("OPENAI_API_KEY", None)
STATE = os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="llmevo-tests-")

import pytest
import torch

from llmevo.cli import terminal
from support.browser import BROWSER, DRIVER
from support.workspace import Workspace, new_workspace, write_task

pytest.register_assert_rewrite("llmevo.testing")

NEEDS = {
    "vllm": (importlib.util.find_spec("vllm") is not None, "vLLM: make vllm"),
    "ray": (importlib.util.find_spec("ray") is not None, "Ray: pip install '.[ray]'"),
    "browser": (bool(BROWSER and DRIVER), "Chromium: apt-get install chromium chromium-driver"),
    "gpu": (torch.cuda.is_available(), "a CUDA device"),
}
"""Whether this machine has it, by marker."""


def pytest_unconfigure() -> None:
    shutil.rmtree(STATE, ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, (found, name) in NEEDS.items():
        if item.get_closest_marker(marker) and not found:
            pytest.skip(f"needs {name}")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests write need not survive a power cut."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that workspaces are copied from."""
    root = tmp_path_factory.mktemp("models")
    new_workspace(root)
    return root


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the finished runs, one for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "library"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def workspace(
    tmp_path: Path,
    models: Path,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Workspace:
    """A user's folder, and the working directory."""
    monkeypatch.setenv("LLMEVO_HOME", str(tmp_path.with_name(f"{tmp_path.name}-cache")))
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    for shift, name in enumerate(("letters", "letters_heldout")):
        write_task(tmp_path, name, shift)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal, "console", terminal.Terminal(width=160, force_terminal=False))
    monkeypatch.setattr(terminal, "failures", terminal.Terminal(stderr=True, width=160, force_terminal=False))
    return Workspace(tmp_path, monkeypatch, capsys, library)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between tries, which are not waited for."""
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    return waits
