"""The evidence in the prompt: effects, targets, geometry and predictions; masked, and within its budget of tokens."""

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmevo.evaluation.score import Score
from llmevo.llm.templates import Templates
from llmevo.search.evidence import calibration, contrasts, estimate_effects, rank_normal, target
from llmevo.search.genome import Genome
from llmevo.search.prompts import STYLES, completion
from llmevo.search.prompts.chat import TOKENS, tokens
from llmevo.search.prompts.names import shortened
from llmevo.search.prompts.question import Question, SliceGeometry
from llmevo.search.prompts.table import MOST, GeneTable
from llmevo.search.space import Genes, SearchSpace
from llmevo.search.trial import Candidate, Trial
from support.spaces import space

TASKS = {"sums_task": (0.7, "acc,none"), "dates_task": (0.3, "exact_match,number")}
REASON = "dare_ties: model.layers.3.self_attn.q_proj.weight of org/gamma: the merged tensor is not finite"


def trial(place: int, genes: Genes, total: float, origin: str = "gaussian", note: str = "") -> Trial:
    metrics = {"sums_task": {"acc,none": total}, "dates_task": {"exact_match,number": total}}
    return Trial(Candidate(place, 1, origin, genes, note), Score(total, 0.03, metrics, 160))


def failed(place: int, genes: Genes, reason: str = REASON) -> Trial:
    return Trial(Candidate(place, 1, "llm", genes), None, reason)


def height(point: Any) -> float:
    """Rises with the first gene, falls with the second; the last two want to be different."""
    return float(0.4 + 0.2 * point[0] - 0.1 * point[1] - 0.3 * (point[-1] - 0.5) * (point[-2] - 0.5))


def history(over: SearchSpace, count: int, noise: float = 0.01) -> tuple[Trial, ...]:
    """Random points with scores."""
    random = np.random.default_rng(0)
    points = [over.from_unit(random.random(len(over.genes))) for _ in range(count)]
    return tuple(trial(i, g, height(over.to_unit(g)) + noise * random.normal()) for i, g in enumerate(points))


def question(trials: tuple[Trial, ...], over: SearchSpace, **keys: Any) -> Question:
    options: dict[str, Any] = {"wanted": 4, "generation": 3, "sigma": 0.15, "used": 17, "budget": 80, **keys}
    return Question(over, trials, options.pop("tasks", TASKS), **options)


def prompt_text(asked: Question, style: str = "chat", seed: int = 0) -> str:
    return "\n".join(message["content"] for message in STYLES[style].ask(asked, Templates(), seed).messages)


# Statistics


def test_effects_have_the_right_sign_and_size_and_doubt_where_there_is_nothing() -> None:
    over = space(3, layer_granularity=2)
    effects = estimate_effects(question(history(over, 120), over)).effects
    assert [effect.gene for effect in effects] == [*over.genes]
    assert effects[0].strength > 5
    assert effects[1].strength < -3
    assert abs(effects[2].strength) < 3
    assert effects[0].slope == pytest.approx(-2 * effects[1].slope, rel=0.5)
    assert effects[0].contrast > 0.1 > -0.1 > effects[1].contrast
    assert 0 <= effects[0].lowest < 0.1
    assert 1.4 < effects[0].highest <= 1.5


def test_an_interaction_is_found_among_many_pairs_and_none_where_there_is_none() -> None:
    over = space(3, layer_granularity=2)
    (found, *others) = estimate_effects(question(history(over, 150, 0.0), over)).interactions
    assert {found.first, found.second} == {*over.genes[-2:]}
    assert found.strength < -3
    assert len(others) <= 1
    linear = tuple(
        trial(t.candidate.id, t.candidate.genes, over.to_unit(t.candidate.genes)[0]) for t in history(over, 60)
    )
    assert len(estimate_effects(question(linear, over)).interactions) <= 1


@pytest.mark.parametrize("count", [0, 1, 5])
def test_few_scores_are_no_evidence(count: int) -> None:
    over = space(3)
    assert estimate_effects(question(history(over, count), over)).effects == ()
    assert "EFFECTS" not in prompt_text(question(history(over, count), over))


def test_scores_that_are_all_alike_are_no_evidence() -> None:
    over = space(3)
    alike = tuple(trial(i, t.candidate.genes, 0.5) for i, t in enumerate(history(over, 20)))
    assert estimate_effects(question(alike, over)).effects == ()


def test_genes_that_the_chosen_method_lacks_count_for_nothing() -> None:
    over = space(3, merge_method=["ties", "task_arithmetic"])
    density = next(gene for gene in over.genes if gene.parameter == "density")
    trials = [
        trial(i, {**t.candidate.genes, "merge_method": 1.0}, t.candidate.genes[density.name])
        for i, t in enumerate(history(over, 40))
    ]
    effects = {effect.gene: effect for effect in estimate_effects(question(tuple(trials), over)).effects}
    assert effects[density].slope == pytest.approx(0.0, abs=1e-9)


def test_ranks_become_normal_quantiles_and_ties_stay_ties() -> None:
    assert [*rank_normal([5.0, -1e9, 5.0, 7.0])] == pytest.approx([0.0, -1.15, 0.0, 1.15], abs=0.01)


def test_the_target_is_above_the_best_and_within_what_the_tasks_can_give() -> None:
    over = space(3)

    def of(*totals: float) -> float | None:
        return target(question(tuple(trial(i, over.uniform(), total) for i, total in enumerate(totals)), over))

    assert of() is of(0.3) is None
    assert of(0.2, 0.4, 0.6) == pytest.approx(0.65)
    assert of(0.0, 0.0, 0.99) == 1.0
    assert of(2.0, 4.0, 6.0) == 6.5  # metrics that are no shares have no ceiling


def test_contrasts_are_the_bad_ones_that_are_nearest_to_the_best() -> None:
    over = space(1)
    values = {0.1: 0.0, 0.6: 0.1, 0.7: 0.9, 0.75: 0.2, 0.9: 0.8, 1.0: 0.7}
    trials = tuple(trial(i, {"alpha/all/weight": x}, y) for i, (x, y) in enumerate(values.items()))
    assert [t.candidate.id for t in contrasts(question(trials, over), 2)] == [3, 1]
    assert contrasts(question((), over), 2) == []


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [([(1.0, 0.1), (2.0, 0.2), (3.0, 0.3)], 1.0), ([(1.0, 0.3), (2.0, 0.2)], None), ([(1.0, 0.1)] * 5, None)],
)
def test_calibration_is_a_rank_correlation_where_there_is_one(
    pairs: list[tuple[float, float]], expected: float | None
) -> None:
    assert calibration(pairs) == (None if expected is None else pytest.approx(expected))


# What the prompt says of it


def full(over: SearchSpace, count: int = 60, **keys: Any) -> Question:
    """A question with everything in it."""
    names = [over.names[model] for model in over.merged]
    parents = [trial(i, over.parent(m), 0.3 + i / 50, "parent", over.names[m]) for i, m in enumerate(over.merged)]
    rest = [replace(t, candidate=replace(t.candidate, id=100 + i)) for i, t in enumerate(history(over, count))]
    geometry = [
        SliceGeometry(
            label,
            {name: 0.0123 + i / 100 for i, name in enumerate(names)},
            {f"{a}/{b}": 0.25 for i, a in enumerate(names) for b in names[i + 1 :]},
        )
        for label in over.slices
    ]
    options: dict[str, Any] = {
        "suggestions": [(over.uniform(), 0.617, 0.021)],
        "predictions": [(0.55, 0.5), (0.6, 0.52), (0.65, 0.51)],
        "geometry": geometry,
    }
    return question((*parents, failed(90, over.uniform()), *rest), over, **{**options, **keys})


def test_the_prompt_shows_effects_interactions_suggestions_and_predictions() -> None:
    text = prompt_text(full(space(3, layer_granularity=2), 150))
    assert re.search(r"\n- score: alpha\.weight row 1 \+1\.\d±0\.\d, ", text)
    assert re.search(r"\n- sums_task: alpha\.weight row 1 \+1\.\d±0\.\d, ", text)
    assert re.search(r"- beta\.weight in layers 2-3 and gamma\.weight in layers 2-3: -\d+\.\d\n", text)
    assert "S1 0.617±0.021; [33 33 33] [33 33 33]\n" in text
    assert "Your last 3 predictions of scores: on average 0.090±0.026 too high.\n" in text
    assert "STANDARD ERRORS (160 questions, the same for all): a score ±0.030" in text


def test_the_prompt_shows_norms_and_cosines() -> None:
    text = prompt_text(full(space(3, layer_granularity=2)))
    assert "- layers 2-3: alpha 123, beta 223, gamma 323; alpha/beta 25, alpha/gamma 25, beta/gamma 25\n" in text


def test_what_is_not_known_is_not_spoken_of() -> None:
    text = prompt_text(full(space(3), 0, suggestions=(), predictions=(), geometry=()))
    unknown = ("STATISTICS", "BEFORE", "TASK VECTORS", "EFFECTS", "TOGETHER", "METHODS")
    for word in (*unknown, "card:", "a guess", "\n>", "left out"):
        assert word not in text


@pytest.mark.parametrize("count", [40, 1000])
def test_all_recipes_are_shown_worst_to_best_and_of_too_many_the_best_and_the_worst(count: int) -> None:
    over = space(3)
    asked = full(over, count)
    text = prompt_text(asked)
    shown = [int(number) for number in re.findall(r"^#(\d+)[^\n]*; \[", text, re.MULTILINE)]
    values = {t.candidate.id: t.value for t in asked.inside if t.candidate.origin != "parent"}
    ranked = sorted(values, key=lambda number: values[number])
    if count == 40:
        assert shown == ranked
        assert "left out" not in text
    else:
        assert 30 < len(shown) < count
        assert f"Of {count} the {count - len(shown)} in the middle are left out" in text
        worst = len(shown) // 3
        assert shown == [*ranked[:worst], *ranked[worst - len(shown) :]]
    assert text.count("(best)") == 1


def test_failures_of_one_reason_are_told_once() -> None:
    over = space(3)
    trials = (failed(1, over.uniform()), failed(2, over.uniform()), failed(3, over.uniform(), "out of memory"))
    text = prompt_text(question(trials, over))
    assert text.count("FAILED") == 2
    assert text.count("not finite") == 1
    assert "FAILED #2 llm [33 33 33]: dare_ties: model.layers.3" in text


def test_methods_are_compared_where_there_are_several() -> None:
    over = space(3, merge_method=["ties", "task_arithmetic"])
    trials = tuple(trial(i, {**over.uniform(), "merge_method": float(i % 2)}, 0.1 * i) for i in range(6))
    text = prompt_text(question(trials, over))
    assert "- all: ties best 0.400 mean 0.200 of 3; task_arithmetic best 0.500 mean 0.300 of 3\n" in text


# Masks

REAL = ("alpha", "beta", "gamma", "org/", "sums", "dates_", "acc", "exact_match", "weight", "density", "layers")
METHODS = ("dare_ties", "task_arithmetic", "self_attn", "q_proj.weight", "0-1", "2-3")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "keys",
    [
        {"merge_method": "dare_ties"},
        {"merge_method": "dare_ties", "filters": ["self_attn"], "layer_granularity": 2},
        {"merge_method": ["dare_ties", "task_arithmetic"], "layer_granularity": 2, "method_per_slice": True},
    ],
    ids=["plain", "filters", "methods"],
)
def test_no_real_name_is_left_in_a_masked_prompt(style: str, keys: dict[str, Any]) -> None:
    asked = full(space(3, **keys), mask_names=True)
    prompt = STYLES[style].ask(asked, Templates(), 0)
    text = prompt_text(asked, style) + str(prompt.schema)
    for name in (*REAL, *METHODS):
        assert name.lower() not in text.lower(), name
    if style == "chat":
        assert "model A.p" in text or "model A.part" in text


def test_masks_are_the_same_everywhere_and_names_are_back_without_them() -> None:
    over = space(3, merge_method="dare_ties", layer_granularity=2)
    text = prompt_text(full(over, mask_names=True))
    assert "- model C #2: 0.340" in text
    assert "- slice 2: model A 123, model B 223, model C 323; model A/model B 25" in text
    assert "FAILED #90 llm [33 100 33 100 33 100] [33 100 33 100 33 100]: method 1: " in text
    assert "of model C: the merged tensor is not finite" in text
    plain = prompt_text(full(over))
    for name in ("alpha", "beta", "gamma", "sums_task", "acc", "weight", "density", "layers 2-3", "dare_ties"):
        assert name in plain


def test_an_answer_in_masked_names_is_understood_and_its_problems_are_masked() -> None:
    over = space(3, merge_method=["ties", "dare_ties"], layer_granularity=2, method_per_slice=True)
    prompt = STYLES["chat"].ask(question((), over, mask_names=True), Templates(), 0)
    row = [30, 90, 30, 90, 30, 90]
    methods, genome = ["method 2", "method 1"], {"slice 2": row, "slice 1": [999, *row[1:]]}
    reading = prompt.read(json.dumps({"proposals": [{"merge_method": methods, "genome": genome}]}))
    (proposal,) = reading.proposals
    assert (proposal.genes["0-1/merge_method"], proposal.genes["2-3/merge_method"]) == (1.0, 0.0)
    assert (proposal.genes["alpha/0-1/weight"], proposal.genes["alpha/2-3/weight"]) == (1.5, 0.3)
    assert reading.problems
    assert not any(name in problem for problem in reading.problems for name in ("alpha", "weight", "0-1"))


# The budget of tokens


def test_the_estimate_counts_digits_signs_and_long_words_and_never_nothing() -> None:
    assert tokens("[31 50]") == 2 + 4 + 1
    assert tokens("a score") == 1 + 2
    assert tokens("héllo 中") >= 6
    assert tokens("") == 0


def test_a_prompt_like_the_quickstarts_is_short() -> None:
    over = space(4, 30, layer_granularity=15, bounds={"weight": [0, 1.2]})
    tasks = {f"quickstart_task_number_{place}": (0.2, "acc,none") for place in range(5)}
    asked = full(over, 30, tasks=tasks)
    assert len(over.genes) == 8
    assert tokens(prompt_text(asked)) < 4200  # an estimate from above


LONG = "a-very-long-name-of-a-model-that-somebody-has-fine-tuned-on-a-lot-of-synthetic-data" * 3


@pytest.mark.parametrize(
    "keys",
    [
        {"layers": 32, "layer_granularity": 4, "merge_method": "ties"},
        {"layers": 32, "layer_granularity": 1, "merge_method": "della", "filters": ["self_attn", "mlp"]},
        {"layers": 32, "merge_method": "della", "filters": ["a", "b", "c", "d", "e"]},
    ],
    ids=["64 genes", "1152 genes", "72 in a row"],
)
def test_no_number_of_trials_genes_tasks_or_letters_makes_a_prompt_longer_than_its_budget(keys: dict[str, Any]) -> None:
    models = [f"org/{LONG}-{name}" for name in "abcd"]
    over = space(4, **keys)
    genome = over.genome.model_dump(mode="json") | {"models": models}
    over = SearchSpace(Genome.model_validate(genome), over.layers)
    tasks = {f"{LONG}_{place}": (0.1, "acc,none") for place in range(60)}
    few, many = (history(over, count) for count in (3, 100 if len(over.genes) > 64 else 1000))
    broken = tuple(failed(2000 + i, over.uniform(), f"{i} " + "boom " * 1000) for i in range(50))
    for trials in (few, many):
        asked = full(over, 0, tasks=tasks)
        asked = replace(asked, trials=(*asked.trials, *trials, *broken))
        assert tokens(prompt_text(asked)) <= TOKENS
        assert tokens(prompt_text(replace(asked, mask_names=True))) <= TOKENS


def test_long_names_are_cut_and_stay_different() -> None:
    names = [LONG + "a", LONG + "b", LONG + "ab", "short"]
    short = shortened(names, 20)
    assert short["short"] == "short"
    assert len({*short.values()}) == 4
    assert max(map(len, short.values())) <= 20


def test_of_a_large_space_some_slices_are_asked_for_and_the_rest_is_taken_from_the_best() -> None:
    over = space(4, 32, layer_granularity=1)
    best = trial(1, {gene.name: 0.77 for gene in over.genes}, 0.9)
    asked = question((best, trial(2, over.uniform(), 0.1)), over)
    starts: set[str] = set()
    for seed in range(40):
        sheet = GeneTable.of(over, seed)
        starts.add(sheet.slices[0])
        assert len(sheet.numbers) == MOST
    assert len(starts) == 17
    prompt = STYLES["chat"].ask(asked, Templates(), 5)
    sheet = GeneTable.of(over, 5)
    assert f"1=layers {sheet.slices[0]}" in prompt.messages[1]["content"]
    assert "the other 16 keep the values of the best recipe" in prompt.messages[1]["content"]
    rows = [[11, 12, 13, 14]] * 16
    (proposal,) = prompt.read(f'{{"proposals": [{{"genome": {rows}, "spread": "wider"}}]}}').proposals
    for gene in over.genes:
        assert proposal.genes[gene.name] == (0.77 if gene.slice not in sheet.slices else pytest.approx(0.11, abs=0.04))
    assert proposal.spread.count("wider") == proposal.spread.count("same") == 16


# Base models


def test_of_many_genes_a_base_model_is_asked_for_one_block_at_a_time() -> None:
    over = space(4, 32, layer_granularity=2)
    assert len(over.genes) == 64
    best = trial(1, {gene.name: 0.75 for gene in over.genes}, 0.9)
    asked = question((trial(2, over.uniform(), 0.1), best), over)
    seen: set[str] = set()
    for seed in range(8):
        prompt = STYLES["completion"].ask(asked, Templates(), seed)
        assert prompt.integers == 8
        assert len(prompt.messages[-1]["content"]) < 400
        (proposal,) = prompt.read("00 " * 8).proposals
        changed = {name for name, value in proposal.genes.items() if value != 0.75}
        assert len(changed) == 8
        assert not seen & changed
        seen |= changed
    assert len(seen) == 64


def test_sixteen_genes_are_asked_for_at_once() -> None:
    over = space(4, 4, layer_granularity=1)
    assert len(completion.block(over.genes, 3)) == 16


def test_scores_are_shown_as_ranks_so_that_one_bad_row_does_not_hide_the_rest() -> None:
    over = space(1)
    trials = tuple(trial(i, {"alpha/all/weight": 0.0}, value) for i, value in enumerate((-50.0, 0.5, 0.51, 0.51)))
    lines = prompt_text(question(trials, over), "completion").splitlines()
    assert [line[:8] for line in lines] == ["score 00", "score 50", "score 99", "score 99", "score 99"]
