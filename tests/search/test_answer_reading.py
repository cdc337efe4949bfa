"""Parts of an answer besides its table: expressions of depth, moves, beliefs, hypotheses and predictions."""

import builtins
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmevo.evaluation.score import Score
from llmevo.search.prompts.expressions import FUNCTIONS, Expression
from llmevo.search.prompts.names import Names
from llmevo.search.prompts.question import Question, Reading
from llmevo.search.prompts.reading import BELIEFS, HYPOTHESES, MOVES, read
from llmevo.search.prompts.schema import answer_model
from llmevo.search.prompts.table import MOST, GeneTable
from llmevo.search.space import Genes, SearchSpace
from llmevo.search.trial import Candidate, Trial
from support import spaces

TASKS = {"sums": (1.0, "acc,none"), "dates": (-0.5, "exact_match,number")}


space = partial(spaces.space, 2, layer_granularity=1)


def level(over: SearchSpace, value: float) -> Genes:
    return {gene.name: 0.0 if gene.choices else value for gene in over.genes}


def trial(place: int, genes: Genes, total: float) -> Trial:
    metrics = {"sums": {"acc,none": total}, "dates": {"exact_match,number": total}}
    return Trial(Candidate(place, 1, "llm", genes), Score(total, 0.01, metrics, 20))


def question(over: SearchSpace | None = None, **keys: Any) -> Question:
    """With two scored recipes, #3 at 0.4 everywhere, and the best, #7, at 0.6."""
    over = over or space()
    trials = (trial(3, level(over, 0.4), 0.5), trial(7, level(over, 0.6), 0.7))
    options: dict[str, Any] = {
        "tasks": TASKS,
        "wanted": 9,
        "generation": 3,
        "sigma": 0.15,
        "used": 17,
        "budget": 80,
        "slots": 4,
    }
    return Question(over, trials, **{**options, **keys})


def reading(asked: Question | None = None, table: GeneTable | None = None, **parts: Any) -> Reading:
    return read(json.dumps(parts), asked or question(), table)


def columns(genes: Genes, model: str) -> list[float]:
    return [value for name, value in genes.items() if name.startswith(f"{model}/")]


def proposed(recipe: dict[str, Any], asked: Question | None = None) -> Genes:
    found = reading(asked, proposals=[recipe])
    assert found.proposals, found.problems
    return found.proposals[0].genes


# Expressions


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.3", 0.3),
        ("-depth", -0.25),
        ("0.3 + 0.5*depth", 0.425),
        ("(1 - depth)**2 / 3", 0.1875),
        ("2 * depth^2", 0.125),
        ("0.4 if depth > 0.5 else 0.1", 0.1),
        ("0.4 * (depth <= 0.25)", 0.4),
        ("max(0, min(1, 4*depth, row))", 1.0),
        ("clip(row, 0, 1.5)", 1.5),
        ("abs(depth − 1) + exp(0)", 1.75),
        ("bump(0.25, 0.1)", 1.0),
        ("BUMP(0.75, 0.5)", math.exp(-1)),
        ("row", 2.0),
        ("0.7 * (row == 2)", 0.7),
        ("0.4 if 0.2 < depth < 0.3 else 0", 0.4),
        ("0.4 if 0.2 < depth < 0.25 or row > 2 else 0", 0.0),
        ("0.4 if depth and not row > 2 else 0", 0.4),
    ],
)
def test_an_expression_has_the_value_of_its_arithmetic(text: str, value: float) -> None:
    assert Expression(text).value(0.25, 2) == pytest.approx(value)


HOSTILE = [
    "__import__('os').system('touch touched')",
    "().__class__.__bases__[0].__subclasses__()",
    "open('touched', 'w')",
    "(lambda: 1)()",
    "[x for x in (1, 2)][0]",
    "depth.real",
    "depth[0]",
    "'a' * 10",
    "f'{depth}'",
    "True",
    "1j",
    "None",
    "...",
    "(depth := 2)",
    "depth is 1",
    "depth // 1",
    "1 << 9",
    "min(*[1, 2])",
    "max(1, 2, key=abs)",
    "min(1)",
    "exp()",
    "bump(0.5)",
    "bump(0.5, 0)",
    "1 / 0",
    "0 ** -1",
    "(-1) ** 0.5",
    "9**9**9",
    "1 ** 9",
    "exp(1000)",
    "1e308 * 10",
    "1e999",
    "1e300 * 1e300 - 1e300 * 1e300",
    "width",
    "lambda",
    "",
    " ",
    "\0",
    "1\n2",
    "depth = 1",
    "import os",
    "(" * 199,
    "-" * 199 + "1",
    "abs(" * 40 + "1" + ")" * 40,
    "1" + "+1" * 99,
    "1" * 5000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:24]))
def test_what_is_no_expression_is_an_error_and_nothing_is_executed(
    text: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r".") as error:
        Expression(text).value(0.5, 1)
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()
    assert not [*tmp_path.iterdir()]


PIECES = st.sampled_from(
    [*"0123456789.()+-*/^<>=,[]{}'\"\\:@~ \n", "**", "depth", "row", " if ", " else ", " or ", " not ", "lambda ", "e9"]
    + [f"{name}(" for name in (*FUNCTIONS, "eval", "exec", "__import__", "getattr")]
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.text(max_size=40) | st.lists(PIECES, max_size=25).map("".join), st.floats(0, 1))
def test_no_text_makes_an_expression_raise_another_error_call_a_builtin_or_give_anything_but_a_number(
    text: str, depth: float
) -> None:
    called: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("eval", "exec", "open", "getattr"):
            patch.setattr(builtins, name, lambda *given, **_: called.append(given))
        try:
            value = Expression(text).value(depth, 1)
        except ValueError:
            value = 0.0
    assert not called
    assert type(value) is float
    assert math.isfinite(value)


# Columns by depth


def test_columns_by_depth_have_real_values_and_the_others_stay() -> None:
    genes = proposed({"depth": {"alpha.weight": "0.3 + 0.6*depth", "beta": 0.2}})
    assert columns(genes, "alpha") == [0.3, 0.5, 0.7, 0.9]
    assert columns(genes, "beta") == [0.2] * 4
    assert columns(proposed({"depth": {"alpha": "0.1*row"}}), "beta") == [0.6] * 4


def test_a_slice_has_the_depth_of_its_middle() -> None:
    two = question(space(layer_granularity=2))
    assert columns(proposed({"depth": {"alpha": "depth"}}, two), "alpha") == pytest.approx([1 / 6, 5 / 6], abs=1e-4)
    one = question(space(layer_granularity=4))
    assert columns(proposed({"depth": {"alpha": "depth"}}, one), "alpha") == [0.5]
    assert columns(proposed({"depth": {"alpha": "depth"}}, question(space(1))), "alpha") == [0.5]


@pytest.mark.parametrize(
    "said",
    [
        [{"column": "alpha.weight", "expression": "0.3"}],
        [{"column": "ALPHA", "value": 0.3}],
        {" Alpha.Weight ": "0.3"},
        {"al…a.weight": "0.3"},
        {"alpha": "30"},
        {"alpha": 30},
    ],
    ids=str,
)
def test_a_column_may_be_named_and_given_in_several_forms(said: Any) -> None:
    assert columns(proposed({"depth": said}), "alpha") == [0.3] * 4


def test_all_models_and_filters_are_columns_too() -> None:
    asked = question(space(filters=["mlp"], merge_method="ties"))
    assert {*proposed({"depth": {"all.mlp.density": "0.7"}}, asked).values()} == {0.6, 0.7}
    genes = proposed({"depth": {"density": "0.7", "all": "0.1"}}, asked)
    assert {name.rpartition("/")[2]: value for name, value in genes.items()} == {"density": 0.7, "weight": 0.1}


def test_masked_names_are_the_shown_ones_and_problems_have_no_others() -> None:
    asked = question(space(merge_method="ties"), mask_names=True)
    assert columns(proposed({"depth": {"model A.p1": "0.3"}}, asked), "alpha")[::2] == [0.3] * 4
    found = reading(
        asked,
        proposals=[{"depth": {"alpha.weight": "0.3"}}, {"depth": {"model C": "0.3"}}],
        beliefs=[{"model": "model B", "task": "task 1", "direction": "lower"}, {"model": "beta", "direction": "lower"}],
    )
    assert [len(belief.genes) for belief in found.beliefs] == [4]
    assert not found.proposals
    assert len(found.problems) == 3
    assert not [name for name in ("alpha", "beta", "density", "weight") if name in " ".join(found.problems)]


def test_a_misspelt_column_has_a_hint_and_costs_only_itself() -> None:
    found = reading(proposals=[{"depth": {"alpha": "0.3", "bta": "0.2"}}, {"depth": {"bta": "0.2"}}])
    assert columns(found.proposals[0].genes, "alpha") == [0.3] * 4
    assert columns(found.proposals[0].genes, "beta") == [0.6] * 4
    assert len(found.proposals) == 1
    assert sum("did you mean 'beta'?" in problem for problem in found.problems) == 2


def test_expressions_reach_the_rows_that_a_large_table_leaves_out() -> None:
    over = space(100)
    table = GeneTable.of(over, 50)
    assert len(table.numbers) == MOST < len(over.genes)
    asked = question(over)
    (suggestion,) = reading(asked, table, proposals=[{"depth": {"alpha": "depth", "beta": "0.01*row"}}]).proposals
    values = columns(suggestion.genes, "alpha")
    assert (values[0], values[-1], len({*values})) == (0.0, 1.0, 100)
    shown = [suggestion.genes[f"beta/{label}/weight"] for label in table.slices]
    assert shown == [round(0.01 * row, 4) for row in range(1, len(shown) + 1)]  # as the prompt counts them


# Moves


@pytest.mark.parametrize(
    ("move", "alpha", "beta"),
    [
        ({"scale": {"model": "alpha", "rows": [2], "by": 1.5}}, [0.6, 0.9, 0.6, 0.6], [0.6] * 4),
        ({"from": "#3", "scale": {"model": "all", "rows": "all", "by": 1.25}}, [0.5] * 4, [0.5] * 4),
        ({"from": 3, "scale": [{"model": "beta", "by": 2}, {"rows": ["layers 0-0"], "by": 0.5}]}, [0.2, *[0.4] * 3], 0),
        ({"from": "#3", "towards": "#7", "steps": [1.5]}, [0.7] * 4, [0.7] * 4),
        ({"from": "best", "towards": "#3"}, [0.5] * 4, [0.5] * 4),
        ({"from": "#7", "towards": "#3", "steps": 1, "rows": [1, 2]}, [0.4, 0.4, 0.6, 0.6], 0),
        ({"from": "#7", "towards": "#3", "steps": [1], "model": "alpha"}, [0.4] * 4, [0.6] * 4),
        ({"from": "#3", "set": {"alpha": "0.2*row", "beta.weight": 0.1}, "rows": [1, "4"]}, [0.2, 0.4, 0.4, 0.8], 0),
        ({"set": [{"column": "alpha", "expression": "0.1"}], "scale": {"by": 2}}, [0.2] * 4, [1.2] * 4),
        ({"towards": "uniform", "steps": [1]}, [0.5] * 4, [0.5] * 4),
    ],
    ids=str,
)
def test_a_move_changes_a_recipe(move: dict[str, Any], alpha: list[float], beta: Any) -> None:
    genes = proposed({"move": move})
    assert columns(genes, "alpha") == pytest.approx(alpha)
    assert not beta or columns(genes, "beta") == pytest.approx(beta)


def test_a_move_may_begin_at_an_earlier_proposal_or_at_a_suggestion_of_the_statistics() -> None:
    asked = question(suggestions=[(level(space(), 0.3), 0.7, 0.01)])
    moves = [{"from": start, "scale": {"model": "beta", "by": 2}} for start in ("P1", "s1", "S2", "P4")]
    found = reading(asked, proposals=[{"depth": {"alpha": "0.1*row"}}, *({"move": move} for move in moves)])
    assert [columns(p.genes, "alpha") for p in found.proposals[1:]] == [[0.1, 0.2, 0.3, 0.4], [0.3] * 4]
    assert [columns(p.genes, "beta") for p in found.proposals[1:]] == [[1.2] * 4, [0.6] * 4]
    assert len(found.problems) == 2


def test_every_step_is_a_proposal_and_there_are_four_at_most() -> None:
    move = {"from": "#3", "towards": "#7", "steps": [0.5, 1.5, 2, 2.5, 3]}
    found = reading(proposals=[{"reason": "line", "predicted": {"score": 0.8}, "move": move}])
    assert [columns(p.genes, "beta")[0] for p in found.proposals] == pytest.approx([0.5, 0.7, 0.8, 0.9])
    assert {(p.note, p.expected) for p in found.proposals} == {("line", 0.8)}
    assert any("first 4 of 5 steps" in problem for problem in found.problems)


def test_steps_beyond_the_bounds_are_clamped() -> None:
    found = reading(proposals=[{"move": {"scale": {"by": 10}}}])
    assert {*found.proposals[0].genes.values()} == {1.5}
    assert any("clamped 8" in problem for problem in found.problems)


@pytest.mark.parametrize(
    ("move", "problem"),
    [
        ("up", "a move is an object"),
        ({"from": "#7"}, "none of towards"),
        ({"from": "#8", "scale": {"by": 2}}, "'#8' is no scored recipe"),
        ({"from": "P1", "scale": {"by": 2}}, "no usable proposal before it"),
        ({"from": "the best one", "scale": {"by": 2}}, "names no recipe"),
        ({"scale": {"by": "much"}}, "could not convert"),
        ({"scale": {"by": 1e9}}, "a factor is at most"),
        ({"scale": {"model": "gamma", "by": 2}}, "the column 'gamma' is unknown"),
        ({"scale": {"rows": [5], "by": 2}}, "the row '5' is unknown"),
        ({"scale": 2}, "scale is an object"),
        ({"towards": "#3", "steps": [99]}, "shares of the way"),
        ({"towards": "#3", "steps": [None]}, "not a number"),
        ({"set": {"alpha": [1]}}, "not finite"),
        ({"set": "all"}, "names no column"),
        ({"set": {"alpha": "x"}}, "'x' is unknown"),
    ],
    ids=str,
)
def test_a_move_without_a_meaning_is_dropped_with_a_message_and_the_others_stay(move: Any, problem: str) -> None:
    found = reading(proposals=[{"move": move}, {"genome": [[10, 20]] * 4}])
    assert [columns(p.genes, "alpha") for p in found.proposals] == [[0.1] * 4]
    assert len(found.problems) == 1
    assert found.problems[0].startswith("dropped proposal 1: ")
    assert problem in found.problems[0]


def test_there_are_eight_moves_at_most() -> None:
    moves = [{"move": {"scale": {"by": 1.1 + place / 20}}} for place in range(MOVES + 2)]
    found = reading(question(wanted=20), proposals=moves)
    assert len(found.proposals) == MOVES
    assert len(found.problems) == 2


def test_moves_keep_the_method_or_take_the_one_that_is_named() -> None:
    over = space(merge_method=["ties", "linear"])
    asked = question(over)
    assert proposed({"move": {"scale": {"by": 0.5}}}, asked)["merge_method"] == 0.0
    assert proposed({"merge_method": "linear", "move": {"scale": {"by": 0.5}}}, asked)["merge_method"] == 1.0
    other = trial(9, {**level(over, 0.2), "merge_method": 1.0}, 0.1)
    asked = replace(asked, trials=(*asked.trials, other))
    ways = [{"move": {"towards": "#9", "steps": [0.4, 0.6]}}, {"move": {"towards": "#9", "steps": [0.6], "rows": [1]}}]
    assert [p.genes["merge_method"] for p in reading(asked, proposals=ways).proposals] == [0.0, 1.0, 0.0]


def test_the_first_usable_form_of_a_recipe_counts_and_nulls_are_nothing() -> None:
    empty = {"genome": None, "depth": None, "move": None}
    for form in ({"genome": [[30, 30]] * 4}, {"depth": {"all": "0.3"}}, {"move": {"set": {"all": 0.3}}}):
        assert {*proposed({**empty, **form}).values()} == {0.3}
    assert reading(proposals=[empty]).problems == ["dropped proposal 1: it has no genome"]


# Predictions and purposes


def test_scores_are_predicted_for_the_total_and_for_tasks() -> None:
    said = {"score": "0.61", "sums": 62, "DATES": 0.4, "dats": 1}
    found = reading(proposals=[{"purpose": "Learn", "depth": {"all": "0.3"}, "predicted": said}])
    (suggestion,) = found.proposals
    assert (suggestion.purpose, suggestion.expected) == ("learn", 0.61)
    assert suggestion.predicted == {"sums": 0.62, "dates": 0.4}  # the prompt shows tasks in hundredths
    found = reading(proposals=[{"purpose": "win", "depth": {"all": "0.3"}, "predicted": {"dats": 1, "sums": "high"}}])
    assert (found.proposals[0].purpose, found.proposals[0].predicted) == ("", {})
    assert sum("dropped a predicted score" in problem for problem in found.problems) == 2
    assert any("did you mean 'dates'?" in problem for problem in found.problems)


def test_a_predicted_task_score_beyond_1_is_one_where_such_scores_were_seen() -> None:
    trials = (Trial(Candidate(3, 1, "llm", level(space(), 0.4)), Score(9.0, 1.0, {"sums": {"acc,none": 9.0}}, 20)),)
    found = reading(
        replace(question(), trials=trials), proposals=[{"depth": {"all": "0.3"}, "predicted": {"sums": 12}}]
    )
    assert found.proposals[0].predicted == {"sums": 12.0}


# Beliefs


@pytest.mark.parametrize(
    ("said", "direction", "value", "spread"),
    [
        ({"direction": "higher"}, 1, None, None),
        ({"direction": "LOWER ", "value": None}, -1, None, None),
        ({"direction": "stay"}, 0, None, None),
        ({"direction": "higher", "value": 0.9}, 0, 0.9, None),
        ({"value": 90}, 0, 0.9, None),
        ({"value": 2}, 0, 1.5, None),
        ({"value": -3}, 0, 0.0, None),
        ({"range": [0.4, 0.8]}, 0, 0.6, 0.2),
        ({"range": [80, 40]}, 0, 0.6, 0.2),
    ],
    ids=str,
)
def test_a_belief_has_a_direction_or_a_value(
    said: dict[str, Any], direction: int, value: float | None, spread: float | None
) -> None:
    (belief,) = reading(beliefs=[{"model": "alpha", "why": "w", **said}]).beliefs
    assert belief.genes == tuple(f"alpha/{row}-{row}/weight" for row in range(4))
    assert (belief.direction, belief.text, belief.confidence) == (direction, "w", 0.5)
    assert (belief.value, belief.spread) == (pytest.approx(value), pytest.approx(spread))


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ({}, 16),  # of each model, row and filter the weight
        ({"model": "all", "rows": "all"}, 16),
        ({"model": "alpha", "rows": [1, 4]}, 4),
        ({"model": ["alpha", "beta"], "rows": 1}, 4),
        ({"model": "beta", "filter": "mlp", "parameter": "density"}, 4),
        ({"model": "beta.mlp.density", "rows": ["3-3"]}, 1),
        ({"parameter": "any"}, 32),
    ],
    ids=str,
)
def test_a_belief_is_about_the_named_genes(said: dict[str, Any], count: int) -> None:
    asked = question(space(filters=["mlp"], merge_method="ties"))
    (belief,) = reading(asked, beliefs=[{"direction": "higher", **said}]).beliefs
    assert len({*belief.genes}) == len(belief.genes) == count


@pytest.mark.parametrize(("said", "kept"), [(0.8, 0.8), (80, 0.8), ("0.3", 0.3), (-1, 0.0), (1e9, 1.0), ("very", 0.5)])
def test_a_confidence_is_a_share(said: Any, kept: float) -> None:
    found = reading(beliefs=[{"direction": "higher", "confidence": said}])
    assert found.beliefs[0].confidence == kept
    assert bool(found.problems) == (said == "very")


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("more alpha", "it is no object"),
        ({"model": "alpha"}, "neither a direction nor a value"),
        ({"direction": "hgher"}, "did you mean 'higher'?"),
        ({"direction": ["higher"]}, "the direction"),
        ({"value": "high"}, "could not convert"),
        ({"value": float("nan")}, "not finite"),
        ({"range": [1, 2, 3]}, "a range has"),
        ({"model": "alhpa", "direction": "higher"}, "did you mean 'alpha'?"),
        ({"rows": [0], "direction": "higher"}, "the row '0' is unknown"),
        ({"task": "summs", "direction": "higher"}, "did you mean 'sums'?"),
    ],
    ids=str,
)
def test_a_belief_without_a_meaning_costs_only_itself(said: Any, problem: str) -> None:
    found = reading(beliefs=[said, {"direction": "higher", "task": "sums", "why": "more"}])
    assert [belief.text for belief in found.beliefs] == ["sums: more"]
    assert len(found.problems) == 1
    assert found.problems[0].startswith("dropped belief 1: ")
    assert problem in found.problems[0]


def test_an_answer_of_beliefs_alone_is_one() -> None:
    found = reading(analysis="hm", beliefs=[{"direction": "higher"}])
    assert (len(found.beliefs), found.problems, found.analysis) == (1, [], "hm")
    assert not reading(beliefs=[{"direction": "higher"}], proposals=None).problems


# Hypotheses


def test_a_hypothesis_compares_two_recipes_of_the_answer_or_the_search() -> None:
    proposals = [
        {"depth": {"alpha": "0.3"}},
        {"genome": "broken"},
        {"genome": [[10, 20]] * 4},
        {"genome": [[61, 60], *[[60, 60]] * 3]},
    ]
    claims = [
        {"claim": "late", "task": "sums", "better": "P1", "worse": "#7"},
        {"claim": "early", "better": "3", "worse": "p3"},
        {"claim": "same as #7", "task": "total", "better": "P4", "worse": "#3"},
        {"claim": "none", "better": "P2", "worse": "#7"},
        {"claim": "self", "better": "#7", "worse": "P4"},
        {"claim": "half", "better": "#7"},
    ]
    found = reading(proposals=proposals, hypotheses=claims)
    first, second, third = found.hypotheses
    assert (first.text, first.task, first.better) == ("late", "sums", found.proposals[0].genes)
    assert (second.task, second.better, second.worse) == (None, level(space(), 0.4), found.proposals[1].genes)
    assert third.better == level(space(), 0.6)  # the repetition of a candidate stands for it
    assert [problem for problem in found.problems if "hypothesis" in problem] == [
        "dropped hypothesis 4: 'p2' is no scored recipe with these parameters, and no usable proposal before it",
        "dropped hypothesis 5: it compares a recipe with itself",
        "dropped hypothesis 6: '' names no recipe, as #12 or P1 would",
    ]


def test_a_recipe_that_was_not_scored_decides_nothing() -> None:
    failed = Trial(Candidate(8, 1, "llm", level(space(), 0.2)), None, "NaN")
    alone = trial(9, {"alpha/alone": 1.0}, 0.3)
    asked = replace(question(), trials=(*question().trials, failed, alone))
    for reference in ("#8", "#9"):
        assert not reading(asked, hypotheses=[{"claim": "", "better": reference, "worse": "#7"}]).hypotheses


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "part",
    [
        {"beliefs": [{"model": "all", "direction": "higher"}]},
        {"proposals": [{"depth": {"all": "0.5*depth"}}]},
        {"proposals": [{"move": {"towards": "#3", "steps": [0.5]}}]},
        {"proposals": [{"move": {"scale": {"model": "all", "by": 0.5}}}]},
    ],
    ids=["belief", "depth", "towards", "scale"],
)
def test_an_answer_is_about_the_numbers_of_slices_where_the_experts_per_token_are_a_gene_of_the_whole_recipe(
    part: dict[str, Any], masked: bool
) -> None:
    over = space(architecture="moe", mixture={"experts_per_token": [1, 2]})
    found = reading(question(over, mask_names=masked), **part)
    assert len(found.proposals) + len(found.beliefs) == 1, found.problems
    assert not any("experts_per_token" in name for belief in found.beliefs for name in belief.genes)


def test_only_so_many_beliefs_and_hypotheses_are_read() -> None:
    claim = {"claim": "c", "better": "#7", "worse": "#3"}
    found = reading(beliefs=[{"direction": "higher"}] * 99, hypotheses=[claim] * 99)
    assert (len(found.beliefs), len(found.hypotheses)) == (BELIEFS, HYPOTHESES)
    assert len(found.problems) == 2


def test_of_an_answer_that_was_cut_off_the_whole_parts_are_taken() -> None:
    text = json.dumps(
        {
            "beliefs": [{"model": "alpha", "direction": "higher"}, {"model": "beta", "direction": "lower"}],
            "proposals": [{"depth": {"alpha": "0.3"}}, {"move": {"scale": {"by": 0.5}}}, {"depth": {"beta": "0.2"}}],
        }
    )
    found = read(text[:-6], question())
    assert [len(found.proposals), len(found.beliefs)] == [2, 2]
    assert len(read(text[: text.index('"proposals"')], question()).beliefs) == 2


# Hostile answers

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["all", "alpha", "#7", "P1", "best", "sums", "higher", "depth", "0.1*row", "alpha.weight"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["model", "rows", "alpha", "by"]), inner)
    ),
    max_leaves=6,
)
KEYS = ["from", "towards", "steps", "scale", "set", "rows", "model", "parameter", "filter", "by"]
MOVE = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6)
PROPOSAL = st.fixed_dictionaries(
    {}, optional={"move": MOVE | VALUES, "depth": VALUES, "genome": VALUES, "predicted": VALUES}
)
BELIEF = st.dictionaries(st.sampled_from(["direction", "value", "range", "task", "confidence", "why", *KEYS]), VALUES)
CLAIM = st.dictionaries(st.sampled_from(["claim", "task", "better", "worse"]), VALUES)
ANSWER = st.fixed_dictionaries(
    {
        "proposals": st.lists(PROPOSAL, max_size=4) | VALUES,
        "beliefs": st.lists(BELIEF, max_size=3) | VALUES,
        "hypotheses": st.lists(CLAIM, max_size=3) | VALUES,
    }
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ANSWER, st.booleans())
def test_no_answer_makes_the_reader_raise_or_leave_the_bounds(answer: Any, masked: bool) -> None:
    over = space(merge_method=["ties", "linear"], method_per_slice=True, filters=["mlp"])
    for asked in (question(mask_names=masked), question(over, mask_names=masked)):
        found = read(json.dumps(answer), asked)
        names = {gene.name for gene in asked.space.genes}
        assert all(asked.space.contains(p.genes) and asked.space.clamp(p.genes) == p.genes for p in found.proposals)
        assert all(math.isfinite(value) for p in found.proposals for value in p.predicted.values())
        for belief in found.beliefs:
            assert {*belief.genes} <= names
            assert 0 <= belief.confidence <= 1
            assert belief.direction in (-1, 0, 1)
        assert all(asked.space.contains(h.better) and asked.space.contains(h.worse) for h in found.hypotheses)
        assert all(problem.isprintable() for problem in found.problems)
        json.dumps([found.problems, found.analysis], ensure_ascii=False).encode()


# The schema

UNSUPPORTED = {
    *("oneOf", "allOf", "not", "if", "patternProperties", "default", "prefixItems", "minLength", "maxLength", "title"),
    *("uniqueItems", "pattern", "format", "exclusiveMinimum", "dependentRequired"),
}
SPACES = [
    space(),
    space(layer_granularity=4),
    space(100),
    space(filters=["mlp"], merge_method=["ties", "linear"], method_per_slice=True),
]


def parts_of(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for key, part in schema.items():
            # Names of properties are no keywords.
            yield from parts_of([*part.values()] if key in ("properties", "$defs") else part)
    for part in schema if isinstance(schema, list) else ():
        yield from parts_of(part)


@pytest.mark.parametrize("over", SPACES, ids=lambda over: f"{len(over.genes)} genes")
@pytest.mark.parametrize("keys", [{}, {"short": True}, {"slots": 0}, {"mask_names": True}], ids=str)
def test_the_schema_is_one_that_strict_servers_take(over: SearchSpace, keys: dict[str, Any]) -> None:
    schema = answer_model(question(over, **keys)).model_json_schema()
    assert schema["type"] == "object"
    for part in parts_of(schema):
        assert not UNSUPPORTED & part.keys()
        if part.get("type") == "object":
            assert part["additionalProperties"] is False
            assert part["required"] == [*part["properties"]]
        if part.get("type") == "array":
            assert part["maxItems"] <= MOST
        kinds = [schema["$defs"].get(one.get("$ref", "").rpartition("/")[2]) for one in part.get("anyOf", ())]
        first = [next(iter(kind["properties"])) for kind in kinds if kind]
        assert len({*first}) == len(first)  # OpenAI tells alternatives apart by their first keys

    def depth(part: Any, seen: tuple[str, ...] = ()) -> None:
        for inner in parts_of(part):
            name = inner.get("$ref", "").rpartition("/")[2]
            assert name not in seen, "recursive"
            if name:
                depth(schema["$defs"][name], (*seen, name))

    depth({key: part for key, part in schema.items() if key != "$defs"})


@pytest.mark.parametrize("over", SPACES, ids=lambda over: f"{len(over.genes)} genes")
def test_the_schema_is_small(over: SearchSpace) -> None:
    full, short = (json.dumps(answer_model(question(over, short=s)).model_json_schema()) for s in (False, True))
    assert len(full) < 5000
    assert len(short) < 1800


def test_an_answer_of_the_schema_is_read_without_a_problem() -> None:
    asked = question()
    empty: dict[str, Any] = {"genome": None, "depth": None, "move": None}
    predicted = {"score": 0.7, "sums": 0.6, "dates": None}
    forms: list[dict[str, Any]] = [
        {"genome": [[10, 20]] * 4},
        {"depth": [{"column": "alpha.weight", "expression": "0.3 + 0.5*depth"}]},
        {"move": {"scale": {"model": "alpha", "rows": None, "by": 1.2}, "from": "#7"}},
        {"move": {"towards": "#3", "from": "best", "steps": [0.5, 1.5], "rows": [1]}},
        {"move": {"set": [{"column": "beta", "expression": "0.2"}], "from": "#3", "rows": None}},
    ]
    said = {"model": "alpha", "rows": None, "task": None, "direction": "higher", "value": None, "confidence": 0.7}
    text = json.dumps(
        {
            "analysis": "a",
            "beliefs": [{**said, "why": "w"}],
            "proposals": [{"reason": "r", "purpose": "learn", **empty, **f, "predicted": predicted} for f in forms],
            "hypotheses": [{"claim": "c", "task": "sums", "better": "P1", "worse": "#7"}],
        }
    )
    assert answer_model(asked).model_validate_json(text)
    found = read(text, asked)
    assert (len(found.proposals), len(found.beliefs), len(found.hypotheses), found.problems) == (6, 1, 1, [])
    assert {p.expected for p in found.proposals} == {0.7}


def test_a_short_answer_is_read_without_a_problem() -> None:
    asked = question(short=True)
    proposals = [{"reason": "r", "genome": [[10, 20]] * 4, "predicted_score": 0.7}]
    text = json.dumps({"proposals": proposals, "beliefs": [{"model": "alpha", "rows": [4], "direction": "higher"}]})
    assert answer_model(asked).model_validate_json(text)
    found = read(text, asked)
    assert (found.proposals[0].expected, found.beliefs[0].genes, found.problems) == (0.7, ("alpha/3-3/weight",), [])


def test_a_task_may_have_any_name() -> None:
    tasks = dict.fromkeys(("name", "self", "score", "field_0"), (1.0, "acc,none"))
    for short in (False, True):
        assert answer_model(replace(question(short=short), tasks=tasks)).model_json_schema()


def test_the_schema_names_the_tasks_as_the_prompt_does() -> None:
    tasks = {f"a very long name of a task, which is number {place}": (1.0, "acc,none") for place in range(20)}
    for masked in (False, True):
        asked = replace(question(mask_names=masked), tasks=tasks)
        keys = answer_model(asked).model_json_schema()["$defs"]["Predicted"]["required"]
        names = Names(asked.space, tasks, masked).tasks
        assert keys[0] == "score"
        assert {*keys[1:]} <= {*names.values()}
        assert len(keys) == 13
        recipe = {"depth": {"model A" if masked else "alpha": "0.3"}, "predicted": {keys[3]: 0.5}}
        assert [*reading(asked, proposals=[recipe]).proposals[0].predicted.values()] == [0.5]


NAMED: dict[str, Any] = {
    "columns": {"beta": 90, "alpha": 10},
    "columns by row": {"beta": [90, 90, 90, 90], "alpha": 10},
    "rows": {"layers 0-0": [10, 90], "2": [10, 90], "layers 2-2": [10, 90], "4": {"beta": 90, "alpha": 10}},
    "rows of columns": [{"beta.weight": 90, "alpha.weight": 10}] * 4,
    "rows by number": {"row 1": [10, 90], "row 2": [10, 90], "row 3": [10, 90], "row 4": [10, 90]},
    "columns by parameter": {"beta": {"weight": [90, 90, 90, 90]}, "alpha": {"weight": 10}},
    "in another object": {"rows": [[10, 90]] * 4},
    "text": "[[10, 90], [10, 90], [10, 90], [10, 90]]",
}


@pytest.mark.parametrize("genome", NAMED.values(), ids=NAMED)
def test_a_table_with_names_is_read_by_them(genome: Any) -> None:
    over = space()
    genes = proposed({"genome": genome}, question(over))
    assert (columns(genes, "alpha"), columns(genes, "beta")) == ([0.1] * 4, [0.9] * 4)


def test_names_that_a_table_lacks_are_not_guessed() -> None:
    said = [{"genome": {"gama": 90, "alpha": 10}}, {"genome": {"alpha": 10}}, {"genome": None}]
    found = reading(proposals=said)
    assert not found.proposals
    for problem, words in zip(found.problems, ("'gama'", "a row has no beta.weight", "it has no genome"), strict=True):
        assert words in problem


def test_a_point_makes_decimals_also_of_whole_numbers() -> None:
    assert columns(proposed({"genome": [[1.0, 1.0]] * 4}), "alpha") == [1.0] * 4
    assert columns(proposed({"genome": [[1, 1]] * 4}), "alpha") == [0.01] * 4


def test_the_tables_of_an_answer_hold_decimals_or_hundredths_as_a_whole() -> None:
    def first_of(*values: float) -> list[float]:
        found = reading(proposals=[{"genome": [[value, value]] * 4} for value in values]).proposals
        return [columns(of.genes, "alpha")[0] for of in found]

    assert first_of(0.5, 1) == [0.5, 1.0]
    assert first_of(1.0, 45.0) == [0.01, 0.45]
    assert first_of(0.5, 45) == [0.5, 0.45]


def test_a_predicted_total_that_the_sum_of_tasks_can_reach_is_no_hundredths() -> None:
    four = replace(question(tasks={f"task {place}": (1.0, "acc,none") for place in range(4)}), trials=())
    for said, total in ((3.1, 3.1), (78, 0.78)):
        (found,) = reading(four, proposals=[{"genome": [[10, 90]] * 4, "predicted": said}]).proposals
        assert found.expected == total


def test_a_predicted_total_in_hundredths_is_a_share_where_scores_are_and_an_absurd_one_is_dropped() -> None:
    table = [[10, 90]] * 4
    shares = question(tasks={"sums": (1.0, "acc,none")})
    (total,) = reading(shares, proposals=[{"genome": table, "predicted": {"score": 78}}]).proposals
    assert total.expected == 0.78
    found = reading(shares, proposals=[{"genome": table, "predicted": {"score": 1e308, "sums": 1e300}}])
    assert (found.proposals[0].expected, found.proposals[0].predicted) == (None, {})
    assert len([problem for problem in found.problems if "is no score" in problem]) == 2


def test_the_answer_may_be_inside_another_object_and_a_later_empty_one_is_passed_over() -> None:
    whole = {"proposals": [{"genome": [[10, 90]] * 4}]}
    for text in (json.dumps({"answer": whole}), f"{json.dumps(whole)} {json.dumps({'proposals': []})}"):
        assert len(read(text, question()).proposals) == 1


def test_in_older_logs_answers_are_read_as_they_were() -> None:
    asked = question(before_rules_4=True)
    assert columns(proposed({"genome": [[1.0, 1.0]] * 4}, asked), "alpha") == [0.01] * 4
    for total in (78, 2e6):
        (found,) = reading(asked, proposals=[{"genome": [[10, 90]] * 4, "predicted": total}]).proposals
        assert found.expected == total
