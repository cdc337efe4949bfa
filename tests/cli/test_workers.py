"""The option `--workers` of the commands."""

from pathlib import Path
from typing import Any

import pytest

from llmevo.config import read_config
from llmevo.run.experiment import Experiment
from llmevo.run.log import events
from llmevo.run.log.storage import LOG, RunLog, read_log
from llmevo.run.resume import prepare
from support.workspace import Workspace


def stopped(workspace: Workspace, **changes: Any) -> Path:
    """The folder of a run that was stopped after its start rows; `changes` replace fields of its first event."""
    workspace.finished()
    folder = workspace.root / "run"
    log = read_log(folder)
    assert isinstance(log[0], events.RunStarted)
    log[0] = log[0].model_copy(update=changes)
    end = next(place for place, event in enumerate(log) if isinstance(event, events.Told)) + 1
    lines = [event.model_dump_json(by_alias=True) + "\n" for event in log[:end]]
    (folder / LOG).write_text("".join(lines))
    return folder


def resumed(folder: Path, **options: Any) -> tuple[Experiment, list[str]]:
    """The experiment with which `llmevo resume` goes on, and the warnings."""
    warnings: list[str] = []
    before = (folder / LOG).read_text()
    with RunLog(folder, resume=True) as log:
        experiment = prepare(log, warn=warnings.append, trusted=True, **options)
    assert (folder / LOG).read_text() == before
    return experiment, warnings


def test_resume_sets_the_workers_of_the_session_and_logs_nothing(workspace: Workspace) -> None:
    folder = stopped(workspace, order="strict", workers=2)
    experiment, warnings = resumed(folder, workers=4)
    assert experiment.scorer.count_workers() == 4
    assert experiment.worker_count == 2  # the optimizer asks for as many as before
    assert warnings == []


def test_a_run_that_began_without_workers_says_that_its_candidates_go_on_one_after_the_other(
    workspace: Workspace,
) -> None:
    experiment, warnings = resumed(stopped(workspace), workers=4)
    assert experiment.order == ""
    assert len(warnings) == 1
    assert "began without workers" in warnings[0]
    assert "4 at a time" in warnings[0]


def test_a_run_that_began_without_workers_goes_on_without_them(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    experiment, warnings = resumed(stopped(workspace))
    assert (experiment.scorer.count_workers(), warnings) == (1, [])


def test_a_config_that_is_given_again_says_where_the_workers_of_the_session_run(workspace: Workspace) -> None:
    folder = stopped(workspace, order="strict", workers=2)
    given = read_config(workspace.config(engine={"workers": 3}))
    experiment, _ = resumed(folder, given=given, root=workspace.root)
    assert experiment.scorer.count_workers() == 3


@pytest.mark.parametrize("command", ["run", "compare", "inspect"])
def test_a_config_with_one_gpu_refuses_several_workers_of_the_command_line(workspace: Workspace, command: str) -> None:
    config = workspace.config(engine={"device": "cuda:1"})
    status, printed = workspace.llmevo(command, config, "--workers", 4)
    assert status == 2
    assert "engine: device 'cuda:1' is one GPU, and each of 4 workers has GPUs of its own" in printed


@pytest.mark.parametrize("command", ["run", "compare", "inspect"])
def test_no_number_of_workers_is_a_mistake_of_the_command_line(workspace: Workspace, command: str) -> None:
    status, printed = workspace.llmevo(command, workspace.config(), "--workers", "many")
    assert status == 2
    assert "--workers: give a number of 1 or more, or auto (it is 'many')" in printed
