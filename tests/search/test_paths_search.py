"""The optimizers of layer paths, with scores by a script."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from llmevo.errors import ConfigError
from llmevo.evaluation.score import Score
from llmevo.llm.templates import Templates
from llmevo.merging.path import LayerPath
from llmevo.search.ask_tell import Search
from llmevo.search.genome import Genome
from llmevo.search.optimizers import OPTIMIZERS
from llmevo.search.optimizers.base import Optimizer, Setup
from llmevo.search.paths.both import BothSpaces, FixedPath, FixedPathSearch
from llmevo.search.paths.prompt import PathPrompt, PathQuestion
from llmevo.search.paths.prompt import ask as ask_for_paths
from llmevo.search.paths.registry import PATHS
from llmevo.search.prompts.chat import TOKENS, tokens
from llmevo.search.prompts.question import Prompt, Question, Reading
from llmevo.search.space import SearchSpace
from llmevo.search.trial import Candidate, Suggestion, Trial
from support.paths import TASKS, asked, height, scored, searched, setup, space, start_rows

Make = Callable[[Setup], Optimizer]
EDITED = [name for name in PATHS if name != "paths-cma-es"]


@pytest.fixture(params=PATHS.values(), ids=[*PATHS])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


def best_of(trials: list[Trial]) -> Trial:
    return max(trials, key=lambda trial: trial.value)


def test_every_candidate_is_a_new_path_inside_the_bounds_and_has_a_recipe(make: Make) -> None:
    over = space()
    found = [t.candidate for t in searched(make(setup(over)), over, 30) if t.candidate.path]
    assert len(found) == 27
    assert len({one.path for one in found}) == 27
    for one in found:
        path = over.paths.parse(one.path)
        assert len(path) <= 26
        assert bool(one.genes) == ("merge" in one.path)
        assert sum(of.depth for of in over.decode(one.genes, one.path).slices or []) == len(path)


@pytest.mark.parametrize("name", EDITED)
def test_a_path_has_at_most_so_many_edits_of_the_best_model(name: str) -> None:
    over = space(edits=2)
    for trial in searched(PATHS[name](setup(over)), over, 30):
        if trial.candidate.path:
            assert len(over.paths.edits(LayerPath.parse(trial.candidate.path), "alpha")) <= 2


def test_the_same_seed_gives_the_same_candidates_and_states(make: Make) -> None:
    runs: list[Any] = []
    for _ in range(2):
        over = space()
        optimizer = make(setup(over))
        runs.append(([t.candidate for t in searched(optimizer, over, 16)], optimizer.state()))
    assert runs[0] == runs[1]


def test_another_seed_gives_other_candidates(make: Make) -> None:
    over = space()
    first, second = ([t.candidate for t in searched(make(setup(over, seed)), over, 9)] for seed in (0, 1))
    assert first != second


def test_the_state_changes_whenever_candidates_are_drawn(make: Make) -> None:
    over = space()
    optimizer = make(setup(over))
    optimizer.tell(start_rows(over))
    states = {optimizer.state()}
    for _ in range(3):
        asked(optimizer, 2)
        states.add(optimizer.state())
    assert len(states) == 4


def test_failures_and_empty_generations_do_not_stop_it(make: Make) -> None:
    over = space()
    optimizer = make(setup(over))
    optimizer.tell([])
    for generation in range(4):
        found = asked(optimizer, 3)
        assert found
        candidates = [
            Candidate(10 * generation + i, generation, s.origin, s.genes, path=s.path) for i, s in enumerate(found)
        ]
        optimizer.tell([Trial(candidate, None, "it is not finite") for candidate in candidates])
    optimizer.tell([])
    assert asked(optimizer, 1)


def test_with_several_objectives_the_values_of_earlier_trials_change(make: Make) -> None:
    over = space()
    optimizer = make(setup(over, pareto=True))
    rows = start_rows(over)
    optimizer.retell([], {"sums": 1.0})
    optimizer.tell(rows)
    optimizer.retell([replace(row, scalarized=1 - row.value) for row in rows], {"sums": 1.0})
    assert asked(optimizer, 2)


def test_edits_with_a_surrogate_beat_random_ones_and_single_blocks_at_equal_evaluations() -> None:
    found: dict[str, float] = {}
    for name in ("paths", "paths-random", "paths-exhaustive"):
        over = space()
        found[name] = fmean(best_of(searched(PATHS[name](setup(over, seed)), over, 50)).value for seed in range(2))
    assert found["paths"] > max(found["paths-random"], found["paths-exhaustive"]) + 0.04


def test_the_genetic_algorithm_draws_random_edits_where_all_mutants_of_the_best_are_known() -> None:
    over = space(kinds=["skip"], edits=1)
    trials = searched(PATHS["paths-ga"](setup(over)), over, 30, objective=lambda path: 0.9 * (len(path) == 19))
    assert len(trials) == 30


def test_it_starts_from_the_best_whole_model() -> None:
    over = space(kinds=["skip"])
    rows = [
        replace(row, score=Score(0.9, 0.01, {}, 10)) if row.candidate.note == "beta" else row
        for row in start_rows(over)
    ]
    optimizer = PATHS["paths"](setup(over))
    optimizer.tell(rows)
    assert all(one.path.startswith("beta ") and one.note.startswith("beta: skip ") for one in asked(optimizer, 3))


def test_the_first_candidates_are_single_edits_of_every_kind_at_several_depths() -> None:
    over = space()
    trials = searched(PATHS["paths"](setup(over)), over, 12)
    edits = [over.paths.edits(LayerPath.parse(t.candidate.path), "alpha") for t in trials if t.candidate.path][:6]
    assert {len(of) for of in edits} == {1}
    assert {of[0].kind for of in edits} == {"repeat", "skip", "swap"}
    assert max(of[0].start for of in edits) - min(of[0].start for of in edits) > 6


def test_a_scan_decides_the_first_edits_and_is_believed_as_far_as_the_scores_agree() -> None:
    over = space(kinds=["repeat", "skip"])
    scan = {
        "alpha 0-12 | alpha 8-12 gain 0.5 | alpha 12-20": (0.3, 0.05),
        "alpha 0-10 | alpha 9-10 gain 0.5 | alpha 10-20": (0.1, 0.05),
        "alpha 0-16 | alpha 17-20": (0.01, 0.05),
        "alpha 0-5 | alpha 6-20": (-0.4, 0.05),
        "alpha 0-19": (0.9, 0.01),  # outside the bounds
        "beta 0-16 | beta 17-20": (0.9, 0.01),  # of another model
        "omega 0-20": (0.9, 0.01),
    }
    optimizer = PATHS["paths"](setup(over, scan=scan))
    optimizer.tell(start_rows(over))
    found = asked(optimizer, 3)
    assert [one.note.removeprefix("alpha: ") for one in found] == [
        "repeat 8-12 gain 0.5",
        "skip 16-17",
        "repeat 9-10 gain 0.5",
    ]
    optimizer.tell([scored(Candidate(9 + i, 1, s.origin, s.genes, path=s.path)) for i, s in enumerate(found)])
    assert "alpha: skip 5-6" in [one.note for one in asked(optimizer, 1)]
    assert "alpha: skip 5-6" not in [one.note for one in asked(optimizer, 3)]


# The LLM


def answering(*texts: Any, seen: list[Prompt] | None = None) -> Callable[[Prompt], Reading]:
    """An LLM that proposes these paths; each is a text or a whole proposal."""

    def answer(prompt: Prompt) -> Reading:
        (seen if seen is not None else []).append(prompt)
        paths = [
            {"path": text, "reason": "r", "predicted_score": 0.6} if isinstance(text, str) else text for text in texts
        ]
        return prompt.read(json.dumps({"analysis": "an analysis", "paths": paths}))

    return answer


GOOD = "alpha 0-12 | alpha 8-12 gain 0.5 | alpha 12-20"


def first_answer(answer: Callable[[Prompt], Reading], **keys: Any) -> tuple[list[Suggestion], Reading]:
    over, readings = space(), list[Reading]()
    optimizer = PATHS["paths"](setup(over, style="chat", **keys))
    optimizer.tell(start_rows(over))
    found: list[Suggestion] = []
    for generation in range(4):
        new = [*asked(optimizer, 3, lambda prompt: (readings.append(answer(prompt)), readings[-1])[1])]
        found += new
        optimizer.tell(
            [
                scored(Candidate(100 + 3 * generation + i, 1, s.origin, s.genes, expected=s.expected, path=s.path))
                for i, s in enumerate(new)
            ]
        )
    return found, readings[0]


def test_ask_and_tell_begins_with_the_edits_of_a_scan(tmp_path: Path) -> None:
    row = {"kind": "skip", "path": "one 0-3 | one 4-8", "effect": 0.2, "stderr": 0.1, "score": -1.0}
    (tmp_path / "scan.jsonl").write_text(json.dumps(row) + "\n")
    genome = {"base_model": "base", "models": ["one", "two"], "merge_method": "task_arithmetic", "path": {"scan": "."}}
    search = Search(genome, layers=8, optimizer="paths", seed=0, budget=30, root=tmp_path)
    rows = search.ask(30)
    for candidate in rows:
        search.tell(candidate, float(candidate.origin == "parent" and candidate.note == "one"))
    assert row["path"] in [candidate.path for candidate in search.ask(3)]
    (tmp_path / "scan.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"genome\.path\.scan: "):
        Search(genome, layers=8, optimizer="paths", root=tmp_path)


def test_paths_of_an_llm_are_candidates_and_what_it_said_is_told_it_again() -> None:
    prompts: list[Prompt] = []
    found, reading = first_answer(answering(GOOD, seen=prompts))
    own = [one for one in found if one.origin == "llm"]
    assert [(one.path, one.note, one.expected) for one in own] == [(GOOD, "r", 0.6)]
    assert reading.analysis == "an analysis"
    text = prompts[-1].messages[1]["content"]
    assert "YOUR LAST ANALYSIS: an analysis" in text
    assert f" 24; {GOOD}; repeat 8-12 gain 0.5" in text
    assert re.search(
        r"\n- merge, the best merge of their weights: 0\.480\nLayers may be taken from alpha, beta, merge\.", text
    )
    assert re.search(r"\nYOUR EARLIER PATHS \(predicted > actual\)\n- #100 0\.600 > 0\.\d{3}\n", text)
    assert "EFFECTS of single edits" in text
    assert isinstance(prompts[0], PathPrompt)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (None, "it has no text"),
        (7, "it has no text"),
        ("alpha 0-30", "alpha has 20 layers"),
        ("omega 0-20", "there is no model 'omega'"),
        ("alpha 0-18 | alpha 2-20", "it has 36 layers, more than 26"),
        ("alpha 0-12 | alpha 8-12 gain 100 | alpha 12-20", "outside 0.25 to 1.5"),
        ("alpha 2-20", "its first 2 layers must be 0-2"),
        ("beta 0-20 extra", "'extra' is no gain"),
    ],
)
def test_a_path_of_an_llm_that_cannot_be_used_costs_only_itself(path: Any, told: str) -> None:
    found, reading = first_answer(answering({"path": path, "reason": "r"}, GOOD))
    assert [one.path for one in found if one.origin == "llm"] == [GOOD]
    assert [told in problem for problem in reading.problems] == [True]


@pytest.mark.parametrize(
    "text", ["", "no JSON", '{"paths": []}', '{"paths": null}', '{"paths": [[["x"]]]}', "{" * 3000]
)
def test_an_answer_without_paths_leaves_the_evaluations_to_the_statistics(text: str) -> None:
    found, _ = first_answer(lambda prompt: prompt.read(text))
    assert len(found) == 12
    assert {one.origin for one in found} == {"paths"}


def test_with_masks_no_name_is_in_the_prompt_and_the_answer_uses_letters() -> None:
    prompts: list[Prompt] = []
    masked = "B 0-12 | B 8-12 gain 0.5 | C 12-14 | B 14-20"
    found, _ = first_answer(answering(masked, "alpha 0-20", seen=prompts), mask_names=True)
    text = " ".join(message["content"] for prompt in prompts for message in prompt.messages).lower()
    assert not [name for name in ("alpha", "beta", "sums", "task_arithmetic") if name in text]
    assert [one.path for one in found if one.origin == "llm"] == [
        "alpha 0-12 | alpha 8-12 gain 0.5 | beta 12-14 | alpha 14-20"
    ]


def test_with_masks_every_edit_of_a_path_and_the_analysis_are_without_names() -> None:
    over = space()
    edited = scored(Candidate(9, 1, "llm", {}, path="beta 0-4 | alpha 4-8 | beta 8-12 | alpha 12-20"))
    asked = Question(
        over, [*start_rows(over), edited], TASKS, wanted=3, generation=2, sigma=0.0, used=4, budget=60, mask_names=True
    )
    about = PathQuestion(asked, over.paths, "alpha", ["beta"], analysis="alpha is good\nCONSTRAINTS: none")
    text = ask_for_paths(about, Templates()).messages[1]["content"]
    assert "swap 0-4 C, swap 8-12 C" in text
    assert "YOUR LAST ANALYSIS: model B is good CONSTRAINTS: none" in text
    assert not [name for name in ("alpha", "beta") if name in text]


def test_several_aims_and_constraints_are_told_as_they_are() -> None:
    over, tasks = space(), {"sums": (1.0, "acc,none"), "dates": (1.0, "acc,none")}
    keys: dict[str, Any] = {"wanted": 3, "generation": 2, "sigma": 0.0, "used": 3, "budget": 60}
    rows = [replace(trial, violation=0.5, scalarized=trial.value - 2) for trial in start_rows(over)]
    many = Question(over, rows, tasks, weights={"sums": 0.25, "dates": 0.75}, **keys)
    text = ask_for_paths(PathQuestion(many, over.paths, "alpha", ["beta"]), Templates()).messages[1]["content"]
    assert "TASKS (each is an aim of its own." in text
    assert "- dates: weight 0.75" in text
    bound = Question(over, rows, TASKS, constraints=("sums >= 0.9",), **keys)
    text = ask_for_paths(PathQuestion(bound, over.paths, "alpha", ["beta"]), Templates()).messages[1]["content"]
    best = max(trial.score.total for trial in rows if trial.score)
    assert f"The best score is {best:.3f}, and no path keeps the constraints yet." in text
    assert " -1." not in text


def test_a_mask_is_the_same_model_in_paths_and_in_texts() -> None:
    over = space()
    failed = Trial(Candidate(0, 1, "paths", {}, path="alpha 0-12 | beta 12-20"), None, "alpha and beta do not fit")
    keys: dict[str, Any] = {"generation": 1, "sigma": 0.0, "used": 1, "budget": 40, "slots": 1, "mask_names": True}
    question = Question(over, [failed], {"sums": (1.0, "acc,none")}, 2, **keys)
    text = ask_for_paths(PathQuestion(question, over.paths, "alpha", ["beta"]), Templates()).messages[-1]["content"]
    assert "B 0-12 | C 12-20: model B and model C do not fit" in text


def test_a_prompt_about_paths_stays_within_its_tokens() -> None:
    models = [f"model-{place}" for place in range(12)]
    genome = {"base_model": "base", "models": models, "merge_method": "task_arithmetic", "path": {"edits": 16}}
    over = SearchSpace(Genome.model_validate(genome), 80)
    tasks, trials = {f"a_rather_long_name_of_task_{i}": (0.02, "acc,none") for i in range(50)}, list[Trial]()
    for place in range(40):
        names = [models[(place * 7 + layer) % 12] for layer in range(14)]
        middle = " | ".join(f"{name} {10 + i}-{11 + i} gain 0.{3 + (i + place) % 6}" for i, name in enumerate(names))
        path = str(over.paths.parse(f"base 0-10 | {middle} | base 24-80"))
        metrics = {task: {"acc,none": 0.5} for task in tasks}
        trials.append(Trial(Candidate(place, 1, "llm", {}, path=path), Score(0.5, 0.0, metrics, 500)))
    question = replace(setup(over).question, tasks=tasks, trials=trials, cards=dict.fromkeys(models, "a card " * 200))
    proposed = [(trial.candidate.path, "it repeats a candidate") for trial in trials]
    about = PathQuestion(question, over.paths, "base", [*models, "merge"], proposed=proposed, analysis="why " * 150)
    text = "".join(message["content"] for message in ask_for_paths(about, Templates()).messages)
    assert TOKENS / 2 < tokens(text) <= TOKENS


# Both spaces


def test_both_spaces_search_weights_then_paths_over_the_best_merge_then_the_numbers_of_the_best_path() -> None:
    over = space()

    def merged(path: LayerPath) -> float:
        """Layers of the merge are worth more than those of a model; what is repeated with a gain near 1.2 too."""
        gains = [segment.gains.attention for segment in path.segments if segment.gains.attention != 1.0]
        again = len(path) > 20
        return 0.6 + 0.1 * again - 0.05 * min((abs(gain - 1.2) for gain in gains), default=0.2) * again

    optimizer = BothSpaces(setup(over, budget=40), OPTIMIZERS["llm-off"], (0.4, 0.35, 0.25))
    rows = [
        replace(row, score=Score(0.55, 0.01, {}, 10)) if row.candidate.origin == "uniform" else row
        for row in start_rows(over)
    ]
    trials, told = rows, rows
    while len(trials) < 40:
        optimizer.tell(told)
        new = asked(optimizer, 3)
        assert new
        told = [
            scored(Candidate(len(trials) + i, 1, s.origin, s.genes, path=s.path), merged) for i, s in enumerate(new)
        ]
        trials = [*trials, *told]
    origins = [trial.candidate.origin for trial in trials]
    parts = [origins.index("paths"), origins.index("path-numbers")]
    assert parts == [16, 30]
    assert not any(trial.candidate.path for trial in trials[:16])
    assert all(trial.candidate.path for trial in trials[16:])
    merges = {json.dumps(t.candidate.genes) for t in trials[16:30] if "merge" in t.candidate.path}
    assert len(merges) == 1
    structures = {
        tuple((s.model, s.start, s.stop) for s in LayerPath.parse(t.candidate.path).segments) for t in trials[30:]
    }
    assert len(structures) == 1
    assert len({json.dumps(t.candidate.genes) for t in trials[30:]}) > 5
    assert max(t.value for t in trials[30:]) >= max(t.value for t in trials[:30])


def test_where_no_path_is_better_the_last_part_goes_on_with_the_weights() -> None:
    over = space()
    optimizer = BothSpaces(setup(over, budget=20), OPTIMIZERS["random"], (0.4, 0.3, 0.3))
    trials = searched(optimizer, over, 20, objective=lambda _: 0.0)
    assert [bool(trial.candidate.path) for trial in trials[8:14]] == [True] * 6
    assert [trial.candidate.origin for trial in trials[14:]] == ["random"] * 6


def test_another_budget_is_that_of_all_parts() -> None:
    found: list[list[tuple[str, str]]] = []
    for begun in (30, 1000):
        over = space()
        optimizer = BothSpaces(setup(over, budget=begun), OPTIMIZERS["random"], (0.2, 0.6, 0.2))
        optimizer.extend(30)
        trials = searched(optimizer, over, 30)
        found.append([(trial.candidate.origin, trial.candidate.path) for trial in trials])
    assert found[0] == found[1]


def test_the_last_part_begins_early_where_no_path_is_left() -> None:
    over = space(4, deepest=4, kinds=["skip"], edits=1, first=1, last=1)  # two layers may be left out, or both
    optimizer = BothSpaces(setup(over, budget=30), OPTIMIZERS["random"], (0.2, 0.5, 0.3))
    origins = [trial.candidate.origin for trial in searched(optimizer, over, 30, objective=lambda _: 0.0)]
    assert origins[3:] == ["random"] * 3 + ["paths"] * 3 + ["random"] * 21


def test_a_path_without_numbers_is_searched_no_further_by_numbers() -> None:
    over = space()
    trial = scored(Candidate(9, 1, "paths", {}, path="alpha 0-8 | alpha 9-20"))
    assert FixedPathSearch(setup(over), trial).is_empty
    again = scored(Candidate(9, 1, "paths", {}, path=GOOD))
    numbers = FixedPathSearch(setup(over), again)
    numbers.tell([again])
    one = Suggestion({}, "", path=GOOD)
    for number in range(12):
        (one,) = asked(numbers, 1)
        numbers.tell([scored(Candidate(10 + number, 2, one.origin, one.genes, path=one.path))])
        assert one.genes == {}
        assert one.path.startswith("alpha 0-12 | alpha 8-12")
    assert abs(LayerPath.parse(one.path).segments[1].gains.attention - 0.5) < 0.3
    assert height(LayerPath.parse(GOOD)) == pytest.approx(0.62)


@pytest.mark.parametrize(
    ("path", "numbers"),
    [
        ("alpha 0-8 | alpha 6-8 attention 0.5 | alpha 8-20", []),
        ("alpha 0-8 | beta 8-12 | alpha 12-14 | alpha 12-14 gain 0.5 | alpha 14-20", ["gain/3"]),
        ("alpha 0-8 | alpha 8-10 gain 0.5 | alpha 10-20", ["gain/1"]),
        ("alpha 0-8 | alpha 6-8 temperature 0.8 | alpha 8-20", ["gain/1"]),
        ("alpha 0-8 | alpha 6-8 attention 0.5 | alpha 8-12 | alpha 10-12 gain 0.7 | alpha 12-20", ["gain/3"]),
    ],
)
def test_the_numbers_of_a_path_are_single_gains_of_segments_that_repeat_layers_or_have_a_gain(
    path: str, numbers: list[str]
) -> None:
    parsed = LayerPath.parse(path)
    fixed = FixedPath(space(), parsed, {})
    assert [gene.name for gene in fixed.genes] == numbers
    assert fixed.candidate(fixed.start()) == ({}, parsed)


def test_the_score_of_a_path_outside_the_bounds_of_gains_is_no_score_of_a_path_inside() -> None:
    over = space(gains=(0.25, 0.9))
    trial = scored(Candidate(9, 1, "paths", {}, path="alpha 0-10 | alpha 8-10 | beta 10-12 | alpha 12-20"))
    states: list[str] = []
    for told in ([trial], []):
        numbers = FixedPathSearch(setup(over), trial)
        numbers.tell(told)
        states.append(numbers.state())
    assert states[0] == states[1]


def test_in_logs_before_rules_5_all_segments_but_the_first_and_the_last_have_a_gain() -> None:
    path = "alpha 0-8 | beta 8-12 | alpha 12-14 | alpha 12-14 attention 0.5 | alpha 14-20"
    trial = scored(Candidate(9, 1, "paths", {}, path=path))
    numbers = FixedPathSearch(setup(before_rules_5=True), trial)
    numbers.tell([trial])
    (one,) = asked(numbers, 1)
    assert all(
        segment.gains.attention == segment.gains.mlp != 1.0 for segment in LayerPath.parse(one.path).segments[1:-1]
    )
