"""LLM-Evo-Merge: its rules as they are, and that it goes on where the original stops."""

import json
import math
from typing import Any

import numpy as np
import pytest

from llmevo.evaluation.score import Score
from llmevo.llm.templates import Templates
from llmevo.search.genome import Genome
from llmevo.search.optimizers.base import Answer, Setup, answered
from llmevo.search.optimizers.llm_evo_merge import EXCHANGES, TRIES, LlmEvoMerge, dimensions
from llmevo.search.prompts.question import Prompt, Reading
from llmevo.search.space import Genes, SearchSpace
from llmevo.search.trial import Candidate, Suggestion, Trial


def space(**keys: Any) -> SearchSpace:
    genome = {"models": ["alpha", "beta"], "merge_method": "ties", "base_model": "base", **keys}
    return SearchSpace(Genome.model_validate(genome), 4)


def made(over: SearchSpace | None = None, style: str = "chat", seed: int = 0) -> LlmEvoMerge:
    return LlmEvoMerge(Setup(over or space(), seed, 60, {"sums": (1.0, "acc,none")}, style, Templates()))


def scored(place: int, genes: Genes, total: float | None) -> Trial:
    score = None if total is None else Score(total, 0.01, {"sums": {"acc,none": total}}, 10)
    return Trial(Candidate(place, 0, "gaussian", genes), score, "NaN")


def ask(optimizer: LlmEvoMerge, answer: Answer, size: int = 99) -> list[Suggestion]:
    return answered(optimizer.ask(size), answer)


def mean(*values: Any, thought: str = "t") -> Answer:
    """An answer with these numbers."""
    return lambda prompt: prompt.read(json.dumps({"thought": thought, "mean_genome": [*values]}))


def lost(_: Prompt) -> Reading:
    return Reading(problems=["no server answers"])


def unasked(_: Prompt) -> Reading:
    raise AssertionError("the LLM was asked")


def begun(totals: list[float | None], over: SearchSpace | None = None, **options: Any) -> LlmEvoMerge:
    """An optimizer whose random generation has these scores; further candidates have the score 0."""
    optimizer = made(over, **options)
    optimizer.tell([scored(0, (over or space()).uniform(), 0.99)])
    first = ask(optimizer, unasked)
    values = [*totals, *[0.0] * (len(first) - len(totals))]
    optimizer.tell([scored(1 + i, s.genes, value) for i, (s, value) in enumerate(zip(first, values, strict=True))])
    return optimizer


def units(suggestions: list[Suggestion]) -> np.ndarray:
    return np.array([space().to_unit(suggestion.genes) for suggestion in suggestions])


def prompts(optimizer: LlmEvoMerge, answer: Answer) -> list[Prompt]:
    """Those of one generation."""
    seen: list[Prompt] = []

    def watch(prompt: Prompt) -> Reading:
        seen.append(prompt)
        return answer(prompt)

    ask(optimizer, watch)
    return seen


# As the original does it


def test_the_first_generation_is_random_and_has_the_originals_size() -> None:
    first = ask(made(), unasked)
    assert len(first) == 4 + round(3 * math.log(4))
    assert {suggestion.origin for suggestion in first} == {"random"}
    many = units(ask(made(), unasked) + ask(made(seed=1), unasked) + ask(made(seed=2), unasked))
    assert many.min() < 0.2
    assert many.max() > 0.8


def test_the_next_one_is_mutations_of_the_llms_mean() -> None:
    for total, sigma in ((0.5, 0.05), (-1.0, 0.05)):  # any score is the best so far, at first
        optimizer = begun([total] * 8)
        points = units(ask(optimizer, mean([[[50, 60]], [[40, 50]]])))
        assert optimizer.sigma == sigma
        assert points.mean(0) == pytest.approx([0.5, 0.6, 0.4, 0.5], abs=0.06)
        assert points.std(0).mean() == pytest.approx(sigma, rel=0.5)


def test_the_step_is_large_after_a_generation_that_did_not_improve_on_the_best() -> None:
    optimizer = begun([0.5])
    steps: list[float | None] = []
    for total in (0.5, 0.6, 0.4):
        second = ask(optimizer, mean(50, 50, 50, 50))
        steps.append(optimizer.sigma)
        optimizer.tell([scored(20 + i, s.genes, total) for i, s in enumerate(second)])
    assert steps == [0.05, 0.2, 0.05]  # equal is no improvement


def test_the_llm_is_shown_the_four_best_of_the_last_generation_by_their_places() -> None:
    optimizer = begun([0.1, 0.4, 0.2, 0.3, 0.05])
    (prompt,) = prompts(optimizer, mean(1, 2, 3, 4))
    text = prompt.messages[-1]["content"]
    places = [text.index(f"genome_{place}'") for place in (2, 4, 3, 1)]
    assert places == sorted(places)
    assert "genome_5" not in text
    assert "fitness_score': 0.4," in text
    assert "(1, 2, 1, 2)" in prompt.messages[0]["content"]


def test_values_are_cut_to_hundredths_and_nested_as_the_genome_is() -> None:
    over = space(layer_granularity=2, filters=["self_attn"])
    assert dimensions(over) == (2, 2, 2, 2)
    optimizer = begun([0.9], over)
    optimizer._last[0] = scored(1, {gene.name: gene.from_unit(0.299) for gene in over.genes}, 0.9)  # pyright: ignore[reportPrivateUsage]
    (prompt,) = prompts(optimizer, mean(*[30] * 16))
    assert "'genome_1': [[[[29, 29], [29, 29]], [[29, 29], [29, 29]]], [[" in prompt.messages[-1]["content"]


def test_genes_that_fill_no_box_are_one_list() -> None:
    over = space(merge_method=["ties", "sce"])
    assert dimensions(over) == (len(over.genes),)
    assert ask(begun([0.5], over), mean(*[50] * len(over.genes)))


def test_neither_start_rows_nor_the_best_of_earlier_generations_are_shown() -> None:
    optimizer = begun([0.9])
    assert "0.99" not in prompts(optimizer, mean(50, 50, 50, 50))[-1].messages[-1]["content"]
    optimizer.tell([])
    optimizer = begun([0.9])
    second = ask(optimizer, mean(50, 50, 50, 50))
    optimizer.tell([scored(30 + i, s.genes, 0.1) for i, s in enumerate(second)])
    text = prompts(optimizer, mean(50, 50, 50, 50))[-1].messages[-1]["content"]
    assert "The highest fitness score:\n0.9\n" in text
    assert "fitness_score': 0.9" not in text


def test_the_conversation_goes_on_and_is_sent_again_up_to_its_cap() -> None:
    optimizer = begun([0.5])
    for generation in range(EXCHANGES + 3):
        (prompt,) = prompts(optimizer, mean(50, 50, 50, 50, thought=f"idea {generation}"))
        roles = [message["role"] for message in prompt.messages]
        assert roles == ["system", *["user", "assistant"] * min(generation, EXCHANGES), "user"]
        if generation:
            assert f"idea {generation - 1}" in prompt.messages[-2]["content"]
        optimizer.tell([scored(50 + i, space().uniform(), 0.1) for i in range(4)])


def test_a_generation_may_be_scored_in_parts() -> None:
    parts, whole = made(), made()
    assert [*ask(parts, unasked, 3), *ask(parts, unasked, 3), *ask(parts, unasked, 3)] == ask(whole, unasked)


# Where the original stops


WRONG = {
    "prose": "I would raise the second model.",
    "half": '{"thought": "t", "mean_genome": [50, ',
    "another key": '{"thought": "t", "genome": [1, 2, 3, 4]}',
    "too few": '{"thought": "t", "mean_genome": [1, 2, 3]}',
    "words": '{"thought": "t", "mean_genome": ["a", "b", "c", "d"]}',
    "NaN": '{"thought": "t", "mean_genome": [NaN, 1, 2, 3]}',
    "a long one": "{" * 300_000,
    "nothing": "",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_after_three_unusable_answers_the_mean_of_the_four_best_is_taken(text: str) -> None:
    optimizer = begun([0.4, 0.5, 0.6, 0.7])
    top = [trial.candidate.genes for trial in optimizer._last[:4]]  # pyright: ignore[reportPrivateUsage]
    seen = prompts(optimizer, lambda prompt: prompt.read(text))
    assert len(seen) == TRIES
    assert "cannot be used" in seen[1].messages[-1]["content"]
    assert len(seen[-1].messages[-2]["content"]) < 10_000
    expected = np.mean([space().to_unit(genes) for genes in top], axis=0)
    others = units([*ask(begun([0.4, 0.5, 0.6, 0.7]), lambda prompt: prompt.read(text))])
    assert others.mean(0) == pytest.approx(expected, abs=0.07)


def test_a_lost_llm_is_asked_once_a_generation_and_leaves_no_hole_in_the_conversation() -> None:
    optimizer = begun([0.5])
    assert len(prompts(optimizer, lost)) == 1
    optimizer.tell([scored(20, space().uniform(), 0.3)])
    (prompt,) = prompts(optimizer, mean(50, 50, 50, 50))
    assert [message["role"] for message in prompt.messages] == ["system", "user"]


def test_a_mended_answer_is_taken() -> None:
    answers = iter([lambda prompt: prompt.read("hm"), mean(50, 60, 40, 50)])
    points = units(ask(begun([0.5]), lambda prompt: next(answers)(prompt)))
    assert points.mean(0) == pytest.approx([0.5, 0.6, 0.4, 0.5], abs=0.06)


@pytest.mark.parametrize(
    "answer",
    [mean("50", " 60", 40.0, "50"), mean([50, 60, 40, 50]), lambda p: p.read('{"next_mean_genome": [50, 60, 40, 50]}')],
    ids=["strings", "nested", "the other name"],
)
def test_answers_that_the_original_stops_at_are_understood(answer: Answer) -> None:
    points = units(ask(begun([0.5]), answer))
    assert points.mean(0) == pytest.approx([0.5, 0.6, 0.4, 0.5], abs=0.06)


def test_values_out_of_range_are_clipped() -> None:
    points = units(ask(begun([0.5]), mean(-500, 1e300, 50, 50)))
    assert (points[:, 0].max(), points[:, 1].min()) == (pytest.approx(0, abs=0.2), pytest.approx(1, abs=0.2))


def test_failed_candidates_rank_last_and_a_generation_without_scores_is_drawn_anew() -> None:
    optimizer = begun([None, 0.3, None])
    (prompt,) = prompts(optimizer, mean(50, 50, 50, 50))
    assert prompt.messages[-1]["content"].index("genome_2'") > 0
    assert "genome_1'" not in prompt.messages[-1]["content"]
    optimizer.tell([scored(40 + i, space().uniform(), None) for i in range(8)])
    assert {suggestion.origin for suggestion in ask(optimizer, unasked)} == {"random"}


def test_a_model_that_only_completes_is_asked_for_digits() -> None:
    (prompt,) = prompts(begun([0.5], style="completion"), lambda prompt: prompt.read("50 60 40 50"))
    assert (prompt.integers, prompt.digits, prompt.samples) == (4, 2, 1)
    assert prompt.messages[-1]["content"].endswith('{"mean_genome": ')
    points = units(ask(begun([0.5], style="completion"), lambda prompt: prompt.read("50 60 40 50")))
    assert points.mean(0) == pytest.approx([0.5, 0.6, 0.4, 0.5], abs=0.06)
