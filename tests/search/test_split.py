"""`genome.split`: the layer from which on models change roles."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from llmevo.llm.templates import Templates
from llmevo.search.encode import encode
from llmevo.search.genome import Genome
from llmevo.search.prompts import chat
from llmevo.search.prompts.question import Question
from llmevo.search.space import SearchSpace

TENSORS = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(6)]


def space(**genome: Any) -> SearchSpace:
    given = {"base_model": "base", "models": ["a", "b"], "merge_method": "task_arithmetic", "split": True, **genome}
    return SearchSpace(Genome.model_validate(given), 6)


def weights(of: SearchSpace, **genes: float) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    """The layers of each slice, with the weight of each model, or t."""
    recipe = of.decode({**of.uniform(), **{name.replace("_", "/"): value for name, value in genes.items()}})
    return [
        (
            s.sources[0].layer_range,
            s.parameters or {str(i.model): (i.parameters or {}).get("weight") for i in s.sources},
        )
        for s in recipe.slices or []
    ]


def test_without_a_layer_the_recipes_are_those_of_a_search_without_split() -> None:
    split, plain = space(), space(split=False)
    assert [gene.name for gene in split.genes] == ["split", *(gene.name for gene in plain.genes)]
    for own, other in (
        (split.uniform(), plain.uniform()),
        *((s.parent(m), plain.parent(m)) for s in (split,) for m in s.merged),
    ):
        assert own["split"] == 6
        assert split.decode(own) == plain.decode(other)


def test_from_the_layer_on_partners_have_each_others_values() -> None:
    of = space()
    assert [(span, w["a"], w["b"]) for span, w in weights(of, a_all_weight=0.9, b_all_weight=0.2, split=4)] == [
        ((0, 4), 0.9, 0.2),
        ((4, 6), 0.2, 0.9),
    ]


def test_the_values_of_later_slices_are_exchanged_too() -> None:
    of = space(layer_granularity=3)
    genes = {"a/0-2/weight": 0.1, "b/0-2/weight": 0.2, "a/3-5/weight": 0.3, "b/3-5/weight": 0.4, "split": 2.0}
    found = [
        (s.sources[0].layer_range, *((i.parameters or {}).get("weight") for i in s.sources[:2]))
        for s in of.decode(genes).slices or []
    ]
    assert found == [((0, 2), 0.1, 0.2), ((2, 3), 0.2, 0.1), ((3, 6), 0.4, 0.3)]


def test_slerp_goes_the_other_way() -> None:
    found = weights(space(merge_method="slerp", models=["a"]), a_all_t=0.3, split=2)
    assert found == [((0, 2), {"t": 0.3}), ((2, 6), {"t": 0.7})]


def test_groups_name_the_partners_and_others_keep_their_values() -> None:
    of = space(models=["a", "b", "c"], split=[["a"], ["c"]])
    values = weights(of, a_all_weight=0.1, b_all_weight=0.2, c_all_weight=0.3, split=1)[1][1]
    assert (values["a"], values["b"], values["c"]) == (0.3, 0.2, 0.1)


@pytest.mark.parametrize("genome", [{}, {"layer_granularity": 2}, {"merge_method": "slerp", "models": ["a"]}])
def test_a_recipe_with_a_split_is_encoded_again(genome: dict[str, Any]) -> None:
    of = space(**genome)
    for at in range(1, 7):
        values = {gene.name: 0.11 + place / 20 for place, gene in enumerate(of.genes)}
        genes = of.clamp({**values, "split": float(at)})
        recipe = of.decode(genes)
        assert of.decode(encode(of, recipe, TENSORS)) == recipe


@pytest.mark.parametrize(
    ("genome", "told"),
    [
        ({"models": ["a", "b", "c"]}, "the groups have 1 and 2 models"),
        ({"split": [["a"], ["a"]]}, "a is listed twice"),
        ({"split": [["a"], ["z"]]}, "z is none of the merged models"),
        ({"split": [["a"], ["base"]]}, "base is none of the merged models"),
        ({"split": [[], []]}, "the groups have 0 and 0 models"),
        ({"models": ["a"]}, "split needs two models or more"),
        ({"smooth": True, "layer_granularity": 1}, "smooth and split do not go together"),
        ({"merge_method": "nearswap", "models": ["a"]}, "split has no meaning for nearswap"),
    ],
)
def test_groups_without_partners_are_refused_in_one_line(genome: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        space(**genome)
    assert [told in error["msg"] for error in caught.value.errors()] == [True]


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_an_llm_is_told_of_the_layer_and_may_choose_it(short: bool, masked: bool) -> None:
    of = space()
    question = Question(of, (), {"sums": (1.0, "acc,none")}, 1, 0, 0.0, 0, 9, slots=1, short=short, mask_names=masked)
    prompt = chat.ask(question, Templates(), 0)
    text = " ".join(message["content"] for message in prompt.messages)
    assert ("model A with model B changes" in text) is masked
    assert ("a with b changes" in text) is not masked
    answer = {"proposals": [{"reason": "r", "split": 2, "genome": [[70, 20]]}], "beliefs": [], "analysis": ""}
    (proposal,) = prompt.read(json.dumps(answer)).proposals
    assert proposal.genes == {"split": 2.0, "a/all/weight": 0.7, "b/all/weight": 0.2}
    unread = prompt.read(json.dumps({"proposals": [{"split": "late", "genome": [[70, 20]]}]}))
    assert [p.genes["split"] for p in unread.proposals] == [6.0]
    assert any("took the split of the best recipe" in problem for problem in unread.problems)
