"""Optimizers side by side: runs like any other on one scorer, and numbers that follow from their logs."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmevo.config import parse_config, read_config
from llmevo.errors import RunError
from llmevo.evaluation.judges.verdicts import Verdict
from llmevo.reports.comparison.chart import draw
from llmevo.reports.comparison.compare import Pair, compare
from llmevo.reports.comparison.statistics import holm, paired
from llmevo.reports.comparison.tables import conclusion, markdown
from llmevo.reports.terminal.comparison import Scoreboard
from llmevo.run.comparison import ComparisonRuns, optimizers_of
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, RunLog
from support.stopping import interrupted_at
from support.workspace import Workspace

PNG = b"\x89PNG\r\n"


# Finished runs, written by hand


def finished(
    folder: Path, optimizer: str, seed: int, scores: tuple[float | None, ...], heldout: float | None = None, **more: Any
) -> Path:
    """The log of a run with these search scores, the first two of them start rows."""
    genome = {"models": ["a", "b"], "base_model": "base", "merge_method": "task_arithmetic"}
    config = {
        "genome": genome,
        "tasks": ["sums"],
        "search": {"optimizer": optimizer, "budget": len(scores), "seed": seed},
        **({"llm": {"model": more["model"]}} if "model" in more else {}),
        **more.pop("config", {}),
    }
    started: dict[str, Any] = {
        "config": config,
        "root": ".",
        "prompts": {},
        "versions": {},
        "sources": [{"reference": name, "checksum": name} for name in ("base", "a", "b")],
        "seed": seed,
        "genes": [{"name": "a/all/weight", "low": 0.0, "high": 1.0}],
        "layers": 2,
        "items": 10,
        "heldout_items": 20 if heldout is not None else 0,
        "proposer": "local" if "model" in more else "",
        "style": "",
        "questions": {"search": "x"},
        **more.pop("started", {}),
    }
    model: str = more.pop("model", "")
    log: list[events.Event] = [events.RunStarted(**started)]
    log += more.pop("judged", [])
    rows: list[dict[str, Any]] = [
        {
            "id": place,
            "origin": ("parent", "uniform")[place] if place < 2 else "llm" if model and place % 2 else "gaussian",
            "genes": {"a/all/weight": 0.0 if place < 2 else place / 100},
            "recipe": {},
            "note": "a" if place == 0 else "",
        }
        for place in range(len(scores))
    ]
    for generation, part in enumerate((rows[:2], rows[2:])):
        if model and generation:
            log.append(asked(model))
        log.append(events.Asked(generation=generation, candidates=part))
        for row in part:
            score = scores[row["id"]]
            log.append(
                events.Failed(candidate=row["id"], reason="NaN", seconds={})
                if score is None
                else events.Evaluated(candidate=row["id"], **scored(score, 10))
            )
    if heldout is not None:
        log.append(events.HeldOut(row="a", kind="parent", candidate=0, **scored(0.25, 20)))
        log.append(events.HeldOut(row="best", kind="best", candidate=2, **scored(heldout, 20)))
    if not more.pop("unfinished", False):
        log.append(events.RunFinished(best=None, search_score=None, heldout=None, proposals={}))
    with RunLog(folder) as run:
        for event in log:
            run.append(event)
    return folder


def scored(score: float, items: int) -> dict[str, Any]:
    return {
        "score": score,
        "stderr": 0.1,
        "tasks": {"sums": {"acc,none": score}},
        "items": items,
        "seconds": {"e": 2.0},
    }


def asked(model: str) -> events.Prompted:
    return events.Prompted(
        generation=1,
        model=model,
        style="chat",
        messages=[],
        reply="{}",
        tokens={"prompt": 100, "completion": 10},
        cost=0.5,
        seconds=3.0,
        problems=[],
        analysis="",
        used=1,
    )


def some(root: Path, seeds: int = 3) -> list[Path]:
    """llm a tenth better than cma-es in the end on every seed, and faster."""
    runs: list[Path] = []
    for seed in range(seeds):
        base = 0.3 + seed / 100
        runs.append(
            finished(
                root / f"llm-{seed}", "llm", seed, (0.2, base, base + 0.2, None, base + 0.3), 0.5 + seed / 50, model="m"
            )
        )
        runs.append(
            finished(root / f"cma-es-{seed}", "cma-es", seed, (0.2, base, 0.1, base + 0.1, base + 0.2), 0.4 + seed / 50)
        )
    return runs


def test_scores_curves_and_pairs_are_what_they_are_by_hand(tmp_path: Path) -> None:
    comparison = compare(some(tmp_path))
    llm, cma = comparison.optimizers
    assert (llm.name, cma.name) == ("llm", "cma-es")  # the best first
    assert llm.seeds == [0, 1, 2]
    assert llm.heldout is not None
    assert llm.heldout.mean == pytest.approx(0.52)
    assert llm.heldout.stderr == pytest.approx(0.02 / 3**0.5)
    assert llm.heldout_stderr == pytest.approx(0.1)
    assert llm.curve.mean == pytest.approx([0.2, 0.31, 0.51, 0.51, 0.61])
    assert cma.search is not None
    assert cma.search.mean == pytest.approx(0.51)
    pair = next(pair for pair in comparison.pairs if pair.questions == "heldout")
    assert (pair.first, pair.second, pair.win_rate) == ("llm", "cma-es", 1.0)
    assert pair.result.difference.mean == pytest.approx(0.1)
    assert pair.result.p == 0.25


def test_the_evaluations_to_reach_cma_es_are_counted_seed_by_seed(tmp_path: Path) -> None:
    llm, cma = compare(some(tmp_path)).optimizers
    assert llm.reached == {0: 3, 1: 3, 2: 3}
    assert (llm.median_reached, cma.median_reached) == (3, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmevo.reports.comparison.compare.REFERENCE", "llm")
        llm, cma = compare([*tmp_path.iterdir()]).optimizers
    assert cma.reached == {0: None, 1: None, 2: None}
    assert cma.median_reached is None


def test_the_llms_part_is_summed_and_shared_out(tmp_path: Path) -> None:
    llm, cma = compare(some(tmp_path)).optimizers
    assert cma.llm == {}
    assert (llm.llm["calls"], llm.llm["prompt_tokens"], llm.llm["cost"]) == (3, 300, 1.5)
    assert llm.llm["share"] == pytest.approx(1 / 3)  # one of the three after the start rows
    assert llm.llm["best"] == 0.0


def test_what_judges_took_is_summed_and_has_a_table_only_where_there_are_any(tmp_path: Path) -> None:
    verdicts = [Verdict(key="a", value=0.5), Verdict(key="b", value=1.0)]
    told = {"prompt": 1000, "completion": 20}
    judged = events.Judged(
        task="chat", questions="search", generation=0, model="j", verdicts=verdicts, calls=3, tokens=told, cost=0.25
    )
    runs = [finished(tmp_path / str(seed), "cma-es", seed, (0.1, 0.2, 0.3), judged=[judged]) for seed in range(2)]
    comparison = compare([*runs, finished(tmp_path / "other", "random", 0, (0.1, 0.2, 0.3))])
    assert {of.name: astuple(of.judged) for of in comparison.optimizers} == {
        "cma-es": (4, 6, 2000, 40, 0.5),
        "random": (0, 0, 0, 0, 0.0),
    }
    assert "| cma-es | 4 | 6 | 2,000+40 | 0.5 |" in markdown(comparison, "x.png")
    assert "The judges" not in markdown(compare(some(tmp_path / "others")), "x.png")


def test_two_llms_are_two_rows(tmp_path: Path) -> None:
    runs = [finished(tmp_path / model, "llm", 0, (0.1, 0.2, 0.3), model=model) for model in ("small", "large")]
    assert {of.name for of in compare(runs).optimizers} == {"llm (small)", "llm (large)"}


@pytest.mark.parametrize(("count", "needed"), [(1, 6), (2, 7), (3, 7), (6, 8)])
def test_seeds_are_too_few_where_the_correction_leaves_no_p_significant(count: int, needed: int) -> None:
    def said(seeds: int) -> str:
        result = paired([1.0 + 0.01 * i for i in range(seeds)], [0.013 * i for i in range(seeds)])
        assert result
        ps = holm([result.p] * count)
        return conclusion([Pair(f"a{i}", f"b{i}", "search", result, 1.0, p) for i, p in enumerate(ps)])

    assert said(needed).startswith("Significant at 0.05")
    assert said(needed - 1).startswith("Nothing here is conclusive")
    assert said(needed - 1).endswith(f"take {needed} or more.")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "file").write_text("")
    status, printed = workspace.llmevo("compare", *some(tmp_path), "--out", tmp_path / "file" / "x")
    assert (status, "x cannot be written" in printed, "Traceback" in printed) == (2, True, False), printed


def test_a_page_is_written_into_a_folder_whose_name_is_no_utf_8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/runs\xff"))
    runs = [finished(folder / f"{seed}", "tpe", seed, (0.1, 0.2, 0.3), 0.4) for seed in range(2)]
    done = subprocess.run(
        [sys.executable, "-c", "from llmevo.cli.app import main; main()", "report", *runs],
        check=False,
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "tpe" in (folder / "report.html").read_text()


def test_few_seeds_are_said_to_prove_nothing_and_many_may(tmp_path: Path) -> None:
    assert "Nothing here is conclusive" in markdown(compare(some(tmp_path / "few")), "x.png")
    text = markdown(compare(some(tmp_path / "many", seeds=7)), "x.png")
    assert "Nothing here" not in text
    assert "Significant at 0.05 after correction: llm over cma-es." in text
    assert "| llm | cma-es | 7-0-0 | 100% | +0.100 ± 0.000 | 0.016 | 0.016 |" in text


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_the_picture_is_drawn_for_any_number_of_seeds(tmp_path: Path, seeds: int) -> None:
    assert draw(compare(some(tmp_path, seeds))).startswith(PNG)


def test_a_comparison_without_held_out_questions_is_by_search_scores_and_says_so(tmp_path: Path) -> None:
    runs = [finished(tmp_path / name, name, 0, (0.1, 0.2, 0.3)) for name in ("random", "tpe")]
    comparison = compare(runs)
    assert comparison.final == "search"
    assert comparison.reference is None
    assert "flatter" in markdown(comparison, "x.png")
    assert draw(comparison).startswith(PNG)


def test_a_best_without_a_held_out_score_is_named(tmp_path: Path) -> None:
    runs = [finished(tmp_path / f"{seed}", "tpe", seed, (0.1, 0.2, 0.3), 0.4) for seed in range(2)]
    runs.append(finished(tmp_path / "2", "tpe", 2, (0.1, 0.2, 0.3), started={"heldout_items": 20}))
    text = markdown(compare(runs), "x.png")
    assert f"The best of {runs[2]} has no held-out score: the mean is over the other seeds." in text
    assert "has no held-out score" not in markdown(compare(runs[:2]), "x.png")


def test_runs_whose_every_candidate_failed_are_still_compared(tmp_path: Path) -> None:
    runs = [finished(tmp_path / name, name, 0, (None, None, None)) for name in ("random", "tpe")]
    comparison = compare(runs)
    assert comparison.optimizers[0].search is None
    assert draw(comparison).startswith(PNG)
    assert "random" in markdown(comparison, "x.png")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config": {"tasks": ["logic"]}}, "tasks differ (name: sums and logic)"),
        (
            {"started": {"genes": [{"name": "a/all/weight", "low": 0.0, "high": 2.0}]}},
            "genes differ (a/all/weight: high",
        ),
        (
            {"started": {"sources": [{"reference": n, "checksum": n + "2"} for n in ("base", "a", "b")]}},
            "models differ",
        ),
        ({"started": {"questions": {"search": "y"}}}, "questions differ"),
        ({"started": {"items": 11}}, "number of questions differ"),
        ({"config": {"search": {"optimizer": "tpe", "budget": 9}}}, "budgets differ (3 and 9)"),
        ({"unfinished": True}, "is unfinished; `llmevo resume"),
    ],
)
def test_runs_that_do_not_compare_are_refused_by_what_differs(tmp_path: Path, changes: Any, says: str) -> None:
    runs = [finished(tmp_path / "one", "random", 0, (0.1, 0.2, 0.3))]
    runs.append(finished(tmp_path / "two", "tpe", 0, (0.1, 0.2, 0.3), **changes))
    with pytest.raises(RunError) as caught:
        compare(runs)
    assert says in str(caught.value)
    assert "two" in str(caught.value)


def test_checksums_by_two_rules_are_not_compared_and_those_by_one_are(tmp_path: Path) -> None:
    def with_checksums(name: str, *checksums: str) -> Path:
        sources = [{"reference": n, "checksum": c} for n, c in zip(("base", "a", "b"), checksums, strict=True)]
        optimizer = "random" if name == "one" else "tpe"
        return finished(tmp_path / name, optimizer, 0, (0.1, 0.2, 0.3), started={"sources": sources})

    old = with_checksums("one", "x", "y", "sha256:z")
    compare([old, with_checksums("two", "sha256:x", "sha256:y", "sha256:z")])
    with pytest.raises(RunError, match="models differ"):
        compare([old, with_checksums("other", "sha256:x", "sha256:y", "sha256:other")])


def test_two_runs_of_one_seed_are_refused(tmp_path: Path) -> None:
    runs = [finished(tmp_path / name, "random", 0, (0.1, 0.2, 0.3)) for name in ("one", "two")]
    with pytest.raises(RunError, match="two runs with seed 0"):
        compare(runs)


def test_llm_brings_the_search_without_it() -> None:
    assert optimizers_of("llm, random,llm") == ["llm", "llm-off", "random"]
    assert optimizers_of("llm-off,llm") == ["llm-off", "llm"]
    assert optimizers_of("random") == ["random"]


# From a config


def compared(workspace: Workspace, *options: object, out: str = "c", **config: Any) -> tuple[int, str]:
    values: dict[str, Any] = {"search": {"population": 2, "seed": 5}, "engine": {"self_check": False}, **config}
    rest = ("--optimizers", "random,cma-es", "--seeds", 2, "--budget", 5, "--out", out)
    return workspace.llmevo("compare", workspace.config(**values), *rest, *options)


def test_a_config_is_run_seed_by_seed_and_every_recipe_is_scored_once(workspace: Workspace) -> None:
    status, printed = compared(workspace)
    assert status == 0, printed
    order = [line.split("] ")[1].split(":")[0] for line in printed.splitlines() if ": finished" in line]
    assert order == ["random, seed 5", "cma-es, seed 5", "random, seed 6", "cma-es, seed 6"]
    states = {name: workspace.state(f"c/{name}") for name in ("random-5", "cma-es-5", "random-6", "cma-es-6")}
    begun = [state.started for state in states.values() if state.started]
    assert [started.seed for started in begun] == [5, 5, 6, 6]
    assert all(started.questions == begun[0].questions and started.masks == 5 for started in begun)
    scorings = [
        json.dumps(state.recipes[event.candidate], sort_keys=True)
        for name, state in states.items()
        for event in workspace.events(f"c/{name}")
        if isinstance(event, events.Evaluated) and not event.cached
    ]
    assert len(scorings) == len({*scorings}) <= 4 + 4
    assert all(len(state.trials) == 5 for state in states.values())
    assert states["random-5"].candidates[4].genes != states["random-6"].candidates[4].genes
    assert workspace.llmevo("replay", "c/cma-es-6", "--verify")[0] == 0
    assert Path("c/random-5/best.yml").exists()
    # The same runs, read again, give the same numbers; these follow from the logs.
    numbers, picture = Path("c/comparison.json").read_bytes(), Path("c/comparison.png").read_bytes()
    assert picture.startswith(PNG)
    assert "random" in Path("c/comparison.md").read_text()
    assert workspace.llmevo("compare", "c")[0] == 0
    assert Path("c/comparison.json").read_bytes() == numbers
    for run in json.loads(numbers)["runs"]:
        state = states[Path(run["folder"]).name]
        assert run["scores"] == [trial.value for trial in state.trials.values()]
        assert run["heldout"] == state.heldout["best"].score


def test_an_llm_that_there_is_none_of_is_said(workspace: Workspace) -> None:
    status, printed = compared(workspace, "--optimizers", "llm", "--seeds", 1, llm={"proposer": "auto"})
    assert status == 0, printed
    assert "! llm runs without an LLM, as llm-off does" in printed
    assert "runs without an LLM" not in compared(workspace, out="d")[1]


def test_a_comparison_stopped_anywhere_goes_on_to_what_it_would_have_been(workspace: Workspace) -> None:
    compared(workspace, out="whole")
    for at in (0, 4, 13):
        with interrupted_at(at):
            status, printed = compared(workspace)
        assert status == 130
        assert "the same command goes on: `llmevo compare" in printed
    logs = {file: file.read_bytes() for file in Path("c").glob(f"*/{LOG}")}
    status, printed = compared(workspace)
    assert status == 0, printed
    assert all(file.read_bytes().startswith(before) for file, before in logs.items())
    one, other = (json.loads(Path(f"{out}/comparison.json").read_text()) for out in ("whole", "c"))
    for key in ("budget", "rows", "pairs"):
        assert one[key] == other[key]
    assert [run["scores"] for run in one["runs"]] == [run["scores"] for run in other["runs"]]
    # Nothing was scored twice, whichever process did it.
    uncached = [
        e for f in logs for e in workspace.events(str(f.parent)) if isinstance(e, events.Evaluated) and not e.cached
    ]
    assert len(uncached) <= 4 + 4


def test_more_seeds_add_to_what_is_there_and_another_config_is_refused(workspace: Workspace) -> None:
    options = ("--optimizers", "random")
    compared(workspace, *options, "--seeds", 1)
    log = Path(f"c/random-5/{LOG}")
    before = log.read_bytes()
    status, printed = compared(workspace, *options, "--seeds", 2)
    assert status == 0, printed
    assert "2 runs below c, 1 of them finished already" in printed
    assert log.read_bytes() == before
    status, printed = compared(workspace, *options, "--budget", 6)
    assert status == 2
    assert "c/random-5 was begun with another config:\n  config.search.budget: 5 before, 6 now\n" in printed
    assert log.read_bytes() == before


def test_a_comparison_that_goes_on_shows_what_is_in_the_log_as_one_line(workspace: Workspace) -> None:
    options = ("--optimizers", "random", "--seeds", 1)
    assert compared(workspace, *options)[0] == 0
    log = Path(f"c/random-5/{LOG}")
    lines = log.read_text().splitlines(keepends=True)
    scored = [number for number, line in enumerate(lines) if '"event":"evaluated"' in line]
    log.write_text("".join(lines[: scored[3] + 1]))
    status, printed = compared(workspace, *options)
    assert status == 0, printed
    assert re.findall(r"random, seed 5: (\S+),", printed) == ["4/5", "5/5", "finished"]


def test_questions_and_masks_stay_the_same_whatever_the_seed(workspace: Workspace) -> None:
    from safetensors.torch import load_file

    genome = {"base_model": "base", "models": ["one", "two"], "merge_method": "dare_ties", "dtype": "float32"}
    thinned = {f"{model}/all/{name}": 0.5 for model in ("one", "two") for name in ("weight", "density")}
    search = {"population": 2, "seed": 5, "start_from": [thinned]}
    changes: dict[str, Any] = {"genome": genome, "search": search, "shuffle": True, "limit": 6, "heldout": None}
    status, printed = compared(workspace, "--optimizers", "random", **changes)
    assert status == 0, printed
    rows = [[workspace.state(f"c/random-{seed}").trials[i].value for i in range(4)] for seed in (5, 6)]
    assert rows[0] == rows[1]
    config = workspace.config(**changes)
    assert (
        workspace.llmevo("run", config, "--seed", 6, "--budget", 5, "--optimizer", "random", "--out", "alone")[0] == 0
    )
    for run, out in (("c/random-5", "five"), ("c/random-6", "six"), ("alone", "alone-6")):
        assert workspace.llmevo("export", run, out, "--candidate", 3)[0] == 0
    five, six, alone = (load_file(f"{out}/model.safetensors") for out in ("five", "six", "alone-6"))
    assert all(five[name].equal(six[name]) for name in five)
    assert not all(six[name].equal(alone[name]) for name in six)  # by itself another seed means other masks


def test_a_terminal_gets_a_board_with_a_cell_for_every_run_and_the_time_left(workspace: Workspace) -> None:
    compared(workspace, "--seeds", 1)
    config = read_config(workspace.config(search={"population": 2, "seed": 5}), {"search.budget": 5})
    runs = ComparisonRuns(config, "", workspace.root, Path("c"), ["random", "cma-es"], 2)
    screen = io.StringIO()
    left: list[float] = []
    with Scoreboard(Console(width=120, file=screen, force_terminal=True), runs) as board:
        for entry in runs.entries[:2]:
            state = RunState()
            for event in workspace.events(str(entry.folder)):
                state.apply(event)
                board.watch(entry, event, state)
                left.append(board.seconds_left())
    text = screen.getvalue()
    for words in (
        "4 runs below c, 2 of them finished already",
        "seed 5",
        "seed 6",
        "cma-es, seed 5: finished",
        "left in all",
    ):
        assert words in text
    assert left[-1] > 0  # the second seed is still to come


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nowhere",), "nowhere"),
        (("config.yml", "config.yml"), "one config, or any number of runs"),
        (("config.yml", "--optimizers", "cma"), "'cma' is unknown"),
        (("config.yml", "--optimizers", ""), "unknown"),
        (("config.yml", "--optimizers", "random", "--budget", 2), "4 evaluations"),
        (("tasks",), "holds no run"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(workspace: Workspace, words: tuple[Any, ...], says: str) -> None:
    workspace.config()
    status, printed = workspace.llmevo("compare", *words)
    assert status == 2, printed
    assert says in printed
    assert "Traceback" not in printed
    assert not Path("runs").exists()


def test_the_key_is_not_shown_when_a_comparison_is_stopped(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmevo.cli.compare.play", stop)
    status, printed = compared(workspace, "--api-key", "sk-secret")
    assert status == 130
    assert "goes on" in printed
    assert "sk-secret" not in printed


def test_the_plan_of_a_comparison_changes_nothing_but_optimizer_and_seed(tmp_path: Path) -> None:
    raw = {"genome": {"models": ["a", "b"], "merge_method": "linear"}, "tasks": ["sums"], "search": {"seed": 4}}
    config = parse_config(raw, "x")
    runs = ComparisonRuns(config, "", tmp_path, tmp_path / "out", ["llm", "random"], 2)
    assert [entry.folder.name for entry in runs.entries] == ["llm-4", "random-4", "llm-5", "random-5"]
    for entry in runs.entries:
        made = runs.config_of(entry)
        assert (made.search.optimizer, made.search.seed, made.evaluation_seed) == (entry.optimizer, entry.seed, 4)
        assert made.asking == config.asking
