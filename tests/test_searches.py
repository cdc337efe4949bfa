"""The benchmark of searches: every optimizer gets the same rows and rules, and a recorded search is repeated."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import ndtr

from llmevo.search.genome import Genome
from llmevo.search.space import Array, SearchSpace
from support.fake_server import chat, serving

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


class Bowl:
    """A landscape whose accuracy falls with the distance from a point, each task's from its own."""

    def __init__(self, height: float = 1.0) -> None:
        genome = {"base_model": "base", "models": ["one", "two"], "merge_method": "task_arithmetic"}
        self.space = SearchSpace(Genome.model_validate(genome), 2)
        self.tasks = ["a", "b"]
        self.difficulties: dict[str, Array] = {task: np.linspace(-1, 1, 41) for task in self.tasks}
        self._centres = {"a": np.array([0.3, 0.8]), "b": np.array([0.5, 0.6])}
        self._height = height
        self.asked: list[tuple[int, int]] = []
        self.optimum = (np.array([0.4, 0.7]), float(self.truth(np.array([[0.4, 0.7]]))[0]))
        self.coefficient = (0.55, float(self.truth(np.array([[0.55, 0.55]]))[0]))

    def _ability(self, task: str, points: Array) -> Array:
        return self._height - 4 * ((points - self._centres[task]) ** 2).sum(axis=1)

    def accuracy(self, task: str, points: Array) -> Array:
        return ndtr(self._ability(task, points)[:, None] - self.difficulties[task]).mean(axis=1)

    def truth(self, points: Array) -> Array:
        return np.mean([self.accuracy(task, points) for task in self.tasks], axis=0)

    def answers(self, task: str, points: Array, difficulties: Array, seed: int) -> Array:
        self.asked += [(seed, len(difficulties))] * len(points)
        luck = np.random.default_rng([seed, *task.encode()]).standard_normal(len(difficulties))
        return (self._ability(task, points)[:, None] + luck > difficulties).astype(float)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module of the benchmark, with one landscape, `bowl`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # reads TMPDIR again
    module: Any = importlib.import_module("searches")
    surfaces = {"bowl": Bowl()}
    monkeypatch.setattr(module, "load", surfaces.__getitem__)
    facts = {"texts": {task: [(f"question {number}", "yes") for number in range(41)] for task in ("a", "b")}}
    monkeypatch.setattr(module, "briefing", {"bowl": facts}.__getitem__)
    module.surfaces = surfaces
    return module


def run(module: Any, file: Path, optimizers: str, *words: str) -> list[dict[str, Any]]:
    """The lines of a file after `run`."""
    given = ["run", "--landscape", "bowl", "--optimizers", optimizers, "--out", str(file), "--questions", "16"]
    module.main([*given, "--budget", "15", "--seeds", "2", *words])
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_seconds(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**line, "seconds": 0} for line in lines]


def test_every_search_starts_from_the_same_rows_and_has_the_same_budget(searches: Any, tmp_path: Path) -> None:
    names = "llm-off,cma-es,around-best,cobyqa,cma-es/0.1/5,llm:recombiner"
    lines = run(searches, tmp_path / "s.jsonl", names)
    assert [(line["seed"], line["search"]) for line in lines] == [(s, n) for s in (0, 1) for n in names.split(",")]
    assert {line["evaluations"] for line in lines} == {15}
    assert {tuple(line["marks"]) for line in lines} == {(8, 10, 15)}
    rows = [searches.usual_rows(searches.surfaces["bowl"].space) for _ in range(2)]
    kept = [json.loads(file.read_text()) for file in (tmp_path / "llmevo-searches").iterdir()]
    assert len(kept) == len(lines)
    for found in kept:
        assert found["genes"][: len(rows[0])] == [row.genes for row in rows[0]]
        assert len({json.dumps(genes) for genes in found["genes"]}) == 15
    for line in lines:
        assert line["coefficient"] < line["optimum"]
        assert all(0.3 < score <= line["optimum"] for score in (*line["handed"], *line["best"]))


def test_a_grid_of_coefficients_ends_and_keeps_what_it_found(searches: Any, tmp_path: Path) -> None:
    for line in run(searches, tmp_path / "s.jsonl", "coefficient-3"):
        rows = len(searches.usual_rows(searches.surfaces["bowl"].space))
        assert line["evaluations"] == rows + 3
        assert line["handed"][-1] == line["handed"][1]


def test_questions_are_the_same_for_all_candidates_or_other_ones_for_each_or_none(
    searches: Any, tmp_path: Path
) -> None:
    asked = searches.surfaces["bowl"].asked
    run(searches, tmp_path / "s.jsonl", "random", "--seeds", "1")
    assert set(asked) == {(0, 16)}
    asked.clear()
    run(searches, tmp_path / "s.jsonl", "random", "--seeds", "1", "--mode", "fresh")
    assert len(set(asked)) == 15
    assert len(asked) == 30
    (score,) = searches.Examiner(searches.surfaces["bowl"], 16, "fresh", 0).scores(np.array([[0.5, 0.5]]))
    assert score.stderr > 0
    assert not score.item_scores  # no two candidates' answers are to the same questions
    asked.clear()
    lines = run(searches, tmp_path / "s.jsonl", "random", "--seeds", "1", "--questions", "0")
    assert not asked
    assert lines[-1]["mode"] == "exact"
    assert lines[-1]["handed"] == lines[-1]["best"]  # exact scores: the best-scored is handed over


def test_further_questions_choose_among_finalists_which_count_as_evaluations(searches: Any, tmp_path: Path) -> None:
    asked = searches.surfaces["bowl"].asked
    (line,) = run(searches, tmp_path / "s.jsonl", "random", "--seeds", "1", "--mode", "finals", "--budget", "20")
    assert (line["evaluations"], line["marks"]) == (20 - searches.MOST_FINALISTS, [15, 20])
    assert set(asked) == {(0, 16), (500_000, 16)}
    rows = [searches.Candidate(number, 0, origin, {}) for number, origin in enumerate(("uniform", "coefficient"))]
    rows += [searches.Candidate(number, 0, "parent" if number == 2 else "", {}) for number in range(2, 10)]
    trials = [searches.Trial(row, searches.Score(row.id / 100, 0.0, {}, 0)) for row in rows]

    def picked(*lucky: int) -> int:
        further = [float(number in lucky) for number in range(10)]
        return searches.chosen(trials, trials[4], further).candidate.id

    assert [picked(number) for number in range(10)] == [0, 1, 2, 9, 4, 9, 9, 7, 8, 9]  # 3, 5 and 6 are no finalists
    assert picked(8, 9) == 9  # the search questions count as well


def test_only_what_the_file_lacks_is_run(searches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "s.jsonl"
    first = run(searches, file, "cma-es,random")
    assert run(searches, file, "cma-es,random") == first
    monkeypatch.setattr(searches, "engine_of", {"cma-es": "other", "random": first[1]["engine"]}.__getitem__)
    second = run(searches, file, "cma-es,random")
    assert [line["engine"] for line in second if line["search"] == "cma-es"] == ["other"] * 2
    assert [line for line in second if line["search"] == "random"] == [
        one for one in first if one["search"] == "random"
    ]
    assert len(second) == len(first)
    monkeypatch.setitem(searches.surfaces, "bowl", Bowl(0.5))
    third = run(searches, file, "random")
    assert len(third) == len(first)
    assert {line["optimum"] for line in third if line["search"] == "random"} != {line["optimum"] for line in first}


def test_earlier_lines_stay_until_their_successors_are_there(
    searches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "s.jsonl"
    before = run(searches, file, "cma-es,random")
    monkeypatch.setattr(searches, "engine_of", lambda _: "other")
    line_of, begun = searches.line_of, list[Any]()

    def interrupted(plan: Any, **options: Any) -> dict[str, Any]:
        begun.append(plan)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return line_of(plan, **options)

    monkeypatch.setattr(searches, "line_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(searches, file, "cma-es,random")
    assert searches.measurements.read(file)[: len(before)] == before
    assert [line["engine"] == "other" for line in searches.lines_of(file).values()] == [True, False, False, False]
    after = run(searches, file, "cma-es,random")
    assert len(begun) == 1 + len(after)
    assert [line["engine"] for line in after] == ["other"] * len(before)


def test_the_digest_of_an_optimizer_covers_the_files_it_uses_and_no_others(
    searches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("llm-off", "llm", "cma-es", "random", "cma-es/0.1/5", "cma-es/0.2/5", "cobyqa", "llm:random")
    before = {name: searches.engine_of(name) for name in names}
    assert len(set(before.values())) == len(names)
    original = searches._code

    def changed(file: Path) -> Any:
        tree = original(file)
        return type(tree)(body=tree.body[:-1], type_ignores=[]) if file.stem == "features" else tree

    monkeypatch.setattr(searches, "_code", changed)
    searches.engine_of.cache_clear()
    after = {name: searches.engine_of(name) for name in names}
    searches.engine_of.cache_clear()
    assert {name for name in names if before[name] != after[name]} == {"llm-off", "llm", "llm:random"}


def test_a_recorded_search_is_repeated_from_its_replies(searches: Any, tmp_path: Path) -> None:
    transcript = tmp_path / "replies.jsonl"
    first = run(searches, tmp_path / "one.jsonl", "llm:recombiner", "--transcript", str(transcript))
    assert all(line["calls"] for line in first)
    said = [json.loads(line) for line in transcript.read_text().splitlines()]
    assert len(said) == sum(line["calls"] for line in first)
    assert all(line["messages"] and line["reply"] for line in said)
    interrupted = [{**line, "attempt": 0, "reply": "{}"} for line in said[:1]]
    transcript.write_text("".join(json.dumps(line) + "\n" for line in [*interrupted, *said]))
    again = run(searches, tmp_path / "two.jsonl", "llm:recombiner", "--recorded", str(transcript))
    assert without_seconds(again) == without_seconds(first)
    once = run(searches, tmp_path / "once.jsonl", "llm:recombiner+once", "--recorded", str(transcript))
    assert [line["search"] for line in once] == ["llm:recombiner+once"] * len(first)
    assert [line["best"] for line in once] != [line["best"] for line in first]  # no later answer is read
    # Other replies make another search: it is not the simulated LLM that answers.
    for line in said:
        line["reply"] = "{}"
    transcript.write_text("".join(json.dumps(line) + "\n" for line in said))
    with pytest.raises(SystemExit, match="there is no recorded reply"):
        run(searches, tmp_path / "three.jsonl", "llm:recombiner", "--recorded", str(transcript))


def test_a_server_is_asked_and_its_model_stands_for_it_in_the_results(searches: Any, tmp_path: Path) -> None:
    transcript = tmp_path / "replies.jsonl"
    with serving(chat("no recipe")) as server:
        words = ("--model", "strong", "--transcript", str(transcript), "--seeds", "1")
        (line,) = run(searches, tmp_path / "one.jsonl", f"llm@{server.url}", *words)
    assert line["search"] == "llm@strong"
    assert line["calls"] == len(server.questions) >= 2
    assert server.questions[1]["messages"][-2]["content"] == "no recipe"  # an unreadable answer is asked for once more
    assert server.url not in transcript.read_text()
    again = run(searches, tmp_path / "two.jsonl", "llm@strong", "--recorded", str(transcript), "--seeds", "1")
    assert without_seconds(again) == without_seconds([line])


def test_the_proposals_of_a_small_model_are_asked_for_in_the_short_form_and_have_a_worth(
    searches: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "one.jsonl"
    with serving(chat('{"proposals": [{"genome": [[30, 80]]}]}')) as server:
        (line,) = run(searches, out, f"llm@{server.url}", "--model", "small", "--short", "--seeds", "1")
    assert line["search"] == "llm@small+short"
    assert [message["role"] for message in server.questions[0]["messages"]] == ["user"]
    # The recipe is near the optimum; later answers repeat it, and so propose nothing.
    (generation, truth), *more = line["proposed"]
    space = searches.surfaces["bowl"].space
    point = space.to_unit({"one/all/weight": 0.3, "two/all/weight": 0.8})
    assert (generation, truth) == (0, round(float(searches.surfaces["bowl"].truth(point[None])[0]), 5))
    assert not more
    capsys.readouterr()
    searches.main(["draw", "--landscape", "bowl", "--out", str(tmp_path / "random.jsonl")])
    searches.main(["proposals", str(out), "--random", str(tmp_path / "random.jsonl")])
    rows = capsys.readouterr().out.splitlines()
    assert rows[2:3] == [f"| `bowl` | llm@small+short | {truth:.3f} |  | 1 | 1 |"]
    assert rows[3].startswith("| `bowl` | none: any recipe | 0.")


def test_candidates_that_an_optimizer_wants_among_the_start_rows_are_scored_with_them(
    searches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizers = importlib.import_module("llmevo.search.optimizers")
    kind: Any = optimizers.OPTIMIZERS["random"]
    told: list[int] = []

    class Eager(kind):
        def ask_start(self, rows: Sequence[Any]) -> Any:
            genes = dict.fromkeys(rows[0].genes, 0.25)
            return [type(rows[0])(genes, "eager")]
            yield

        def tell(self, trials: Sequence[Any]) -> None:
            told.append(len(trials))

    monkeypatch.setitem(optimizers.OPTIMIZERS, "eager", Eager)
    run(searches, tmp_path / "s.jsonl", "eager", "--seeds", "1")
    assert told[0] == len(searches.usual_rows(searches.surfaces["bowl"].space)) + 1
    assert sum(told) == 15


def test_the_table_pairs_searches_by_seed(searches: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.jsonl"
    lines = run(searches, file, "llm-off,cma-es,random")
    capsys.readouterr()
    searches.main(["table", str(file), "--at", "10"])
    text = capsys.readouterr().out
    assert text.startswith("`bowl`, 15 evaluations, 16 questions a task, fixed; best coefficient ")
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")] for row in text.splitlines()[2:]}
    handed = {name: [line["handed"][1] for line in lines if line["search"] == name] for name in ("random", "cma-es")}
    difference = np.subtract(handed["random"], handed["cma-es"])
    assert cells["random"][7] == f"{difference.mean():+.3f} ± {difference.std(ddof=1) / 2**0.5:.3f}"
    assert cells["random"][3] == f"{np.mean(handed['random']):.3f} ± {np.std(handed['random'], ddof=1) / 2**0.5:.3f}"
    assert cells["cma-es"][7] == ""
    searches.main(["picture", str(file), "--out", str(tmp_path / "s.svg")])
    assert "cma-es" in (tmp_path / "s.svg").read_text()


def test_the_summary_has_the_share_of_the_way_to_the_optimum(
    searches: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.jsonl"
    lines = run(searches, file, "cma-es,random")
    capsys.readouterr()
    words = ["--landscape", "bowl", "--budget", "15", "--questions", "16", "--at", "10", "15"]
    searches.main(["summary", str(file), *words, "--optimizers", "random,tpe"])
    head, _, random, tpe = capsys.readouterr().out.splitlines()
    assert head == "| search | `bowl` 10 | `bowl` 15 |"
    own = [line for line in lines if line["search"] == "random"]
    ways = [
        [(line["handed"][place] - line["coefficient"]) / (line["optimum"] - line["coefficient"]) for line in own]
        for place in (1, 2)
    ]
    cells = [f"{100 * np.mean(of):.0f} ± {100 * np.std(of, ddof=1) / 2**0.5:.0f}" for of in ways]
    assert random == f"| random | {' | '.join(cells)} |"
    assert tpe == "| tpe |  |  |"


def test_the_published_table_of_searches_is_recomputed_from_its_file(
    searches: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = BENCHMARKS / "results" / "searches.jsonl"
    group = ("quickstart", 60, 64, "fixed")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [line for line in lines if (line["landscape"], line["budget"], line["questions"], line["mode"]) == group]
    searches.main(["table", "--landscape", "quickstart"])
    printed = capsys.readouterr().out.split("\n\n`")
    (shown,) = [part for part in printed if "60 evaluations, 64 questions a task, fixed" in part]
    table = {cells[0].strip(): cells[1:] for cells in (row.strip("|").split("|") for row in shown.splitlines())}
    for name in ("llm-off", "cma-es", "gp", "tpe", "cobyqa"):
        handed = [line["handed"][-1] for line in lines if line["search"] == name]
        assert len(handed) >= 20
        assert table[name][6].strip().startswith(f"{sum(handed) / len(handed):.3f} ± ")


# Many workers: `benchmarks/workers.py`


@pytest.fixture
def workers(searches: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = importlib.import_module("workers")
    monkeypatch.setattr(module, "searches", searches)
    monkeypatch.setattr(module, "LANDSCAPE", "bowl")
    monkeypatch.setattr(module, "QUESTIONS", 20)
    module.questions_of.cache_clear()
    yield module
    module.questions_of.cache_clear()


def scored(workers: Any, order: str, count: int, **options: Any) -> Any:
    return workers.Run(workers.Scene(order, count, "llm-off", **options), 0, 40).search()


@pytest.mark.parametrize("order", ["whole", "parts", "strict", "single", "steady", "early"])
def test_one_worker_is_as_fast_as_one_worker(workers: Any, order: str) -> None:
    found = scored(workers, order, 1).speed()
    assert found["multiple"] == pytest.approx(1.0)
    assert found["unused"] == 0.0


@pytest.mark.parametrize("durations", ["quickstart", "1"])
def test_in_orders_by_generations_time_decides_no_score(workers: Any, durations: str) -> None:
    runs = [scored(workers, order, 4, durations=durations) for order in ("whole", "parts", "strict")]
    scores = [{number: trial.score.total for number, trial in run.trials.items()} for run in runs]
    workers.questions_of.cache_clear()  # so that nothing is remembered from the others
    again = scored(workers, "strict", 4, durations=durations, machines="unequal", swap=0.3)
    assert len(scores[0]) == 40
    assert all(own == scores[0] for own in scores)
    assert {number: trial.score.total for number, trial in again.trials.items()} == scores[0]
    assert runs[2].ended < runs[1].ended <= runs[0].ended


@pytest.mark.parametrize("order", ["parts", "strict", "single", "steady", "early"])
def test_the_time_of_workers_is_worked_or_idle(workers: Any, order: str) -> None:
    """Counted work, further swaps, idle time and answers in vain are all of the time; no worker does two things."""
    run = scored(workers, order, 4, machines="unequal")
    found, capacity = run.speed(), sum(run.scene.speeds) * run.ended
    assert 0 < found["multiple"] <= sum(run.scene.speeds)
    worked = run.fleet.work(0, run.ended) / capacity
    idle = sum(found[name] for name in ("idle first", "idle between", "idle last"))
    assert worked + idle == pytest.approx(1.0)
    assert found["multiple"] * run.ended <= run.fleet.work(0, np.inf) + 1e-9
    if order in ("single", "steady"):
        assert found["idle between"] == pytest.approx(0.0, abs=1e-9)


def test_a_search_goes_on_where_its_file_ends(workers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "workers.jsonl"
    scenes = [workers.Scene(order, 2, "llm-off") for order in ("strict", "single")]
    for count in (1, 2):
        workers.COMMANDS["speed"] = (lambda c=count: iter(scenes[:c]), workers.speed)
        workers.main(["speed", "--seeds", "2", "--out", str(file)])
    assert [json.loads(text)["scene"]["order"] for text in file.read_text().splitlines()] == ["strict", "single"]
    workers.main(["table", str(file)])
    assert "| 2 | 2 | quickstart, llm-off |" in capsys.readouterr().out
