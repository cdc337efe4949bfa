"""Commands for programs: JSON on the standard output and nothing else."""

import json
from pathlib import Path

from support.workspace import Workspace


def output(workspace: Workspace, *words: object) -> str:
    """What a command that succeeds prints on the standard output."""
    status, out, messages = workspace.printed(*words)
    assert status == 0, messages
    return out


def test_report_prints_trials_and_heldout_scores(workspace: Workspace) -> None:
    workspace.finished(search={"optimizer": "random", "budget": 5})
    state = workspace.state("run")
    (found,) = json.loads(output(workspace, "report", "run", "--json"))
    assert (found["run"], found["finished"], found["optimizer"]) == ("run", True, "random")
    assert {of["id"]: of["score"] for of in found["trials"]} == {
        number: trial.score.total for number, trial in state.trials.items() if trial.score
    }
    assert state.best is not None
    assert found["best"] == state.best.candidate.id
    assert found["heldout"]["best"]["score"] == state.heldout["best"].score
    assert found["heldout"]["best"].keys() == {"score", "stderr", "tasks", "items", "candidate", "kind"}
    assert found["trials"][0]["recipe"]["merge_method"] == "task_arithmetic"
    assert not Path("run/report.html").exists()
    status, said = workspace.llmevo("report", "run", "--json", "--out", "page.html")
    assert status == 2
    assert "--out: page.html" in said


def test_replay_prints_the_log_or_what_it_found(workspace: Workspace) -> None:
    workspace.finished(search={"optimizer": "random", "budget": 5})
    assert output(workspace, "replay", "run", "--json") == Path("run/events.jsonl").read_text()
    lines = output(workspace, "replay", "run", "--json", "--generation", 1).splitlines()
    kinds = [json.loads(line)["event"] for line in lines]
    assert "evaluated" in kinds
    assert "run_started" not in kinds
    verified = json.loads(output(workspace, "replay", "run", "--json", "--verify"))
    assert verified == {"run": "run", "verified": len(workspace.events("run")), "finished": True}
    (row,) = json.loads(output(workspace, "replay", "run", "--json", "--rescore", 1))
    assert (row["now"], row["differing"]) == (row["logged"], [])


def test_compare_prints_its_numbers(workspace: Workspace) -> None:
    config = workspace.config(search={"budget": 4})
    words = ("compare", config, "--optimizers", "random", "--seeds", 2, "--out", "c", "--json")
    found = json.loads(output(workspace, *words))
    assert len(found["runs"]) == 2
    assert found == json.loads(Path("c/comparison.json").read_text()) == json.loads(output(workspace, *words))
    assert json.loads(output(workspace, "compare", "c", "--json"))["runs"] == found["runs"]
