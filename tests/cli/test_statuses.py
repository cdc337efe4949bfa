"""Every exit status of the reference occurs, and means what it says there."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmevo.cli.terminal import EXIT_STATUSES
from support.workspace import Workspace

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
WATCH = f"""
import signal, sys
for number in {[*map(int, SIGNALS)]}:
    signal.signal(number, signal.SIG_DFL)  # whatever the tests' own parent ignores, as nohup does
signal.signal(signal.SIGINT, signal.default_int_handler)
from llmevo.cli.app import main
sys.argv = ["llmevo", "watch", "run", "--wait", "100"]
main()
"""


def test_the_statuses_are_those_of_the_tests_below() -> None:
    assert {*EXIT_STATUSES} == {0, 1, 2, *(128 + number for number in SIGNALS)}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_stopped_command_has_the_status_of_its_signal(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-u", "-c", WATCH]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "Waiting for run to begin; Ctrl-C ends the waiting.\n"
        process.send_signal(number)
        assert process.wait(60) == 128 + number


def test_success_a_failure_and_a_mistake_have_statuses_of_their_own(workspace: Workspace) -> None:
    workspace.finished(search={"optimizer": "random", "budget": 5})
    for command in ("watch", "replay", "report", "status"):
        assert workspace.llmevo(command, "run")[0] == 0
    log = Path("run/events.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]))
    status, printed = workspace.llmevo("watch", "run")
    assert (status, "it is not finished" in printed) == (1, True)
    place = max(number for number, line in enumerate(lines) if '"origin":"random"' in line)
    lines[place] = lines[place].replace('"origin":"random"', '"origin":"cma-es"')
    log.write_text("".join(lines))
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert (status, f"line {place + 1}" in printed) == (2, True), printed
    for words in (("replay", "nowhere"), ("replay", "run", "--no-such-option"), ("no-such-command",)):
        assert workspace.llmevo(*words)[0] == 2
