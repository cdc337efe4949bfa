"""Write the pool of questions that the landscapes' recipes answer: `python benchmarks/landscapes/make_pool.py`.

The kinds of questions are those of the quickstart, from other seeds. No question of the pool is among the quickstart's
search, held-out and training questions, nor among those that the experts of `train_overlap.py` learn from. Both
arithmetic tasks ask the same questions, with and without choices.
"""

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "configs" / "quickstart"))

import make_tasks  # noqa: E402
import skills  # noqa: E402

SEED = 100_000
"""reasoning-gym makes question `i` from this plus `i`: far beyond the training's."""
SIZE = 200


def write(name: str, skill: skills.Skill) -> None:
    """The questions and task files of one skill."""
    seen = {item.question for items in skills.parts(skill, skills.TRAINED_ON).values() for item in items}
    rng = random.Random(f"{name}/pool")
    rows: list[str] = []
    for item in skill.items(SEED, SIZE, seen):
        choices = skill.choices(item, rng)
        rows.append(
            json.dumps({"question": item.question, "choices": choices, "answer": choices.index(item.answer)}) + "\n"
        )
    file = f"{name}.pool.jsonl"
    (HERE / "tasks" / file).write_text("".join(rows))
    tasks = {f"pool_{name}": make_tasks.CHOICE}
    if name == make_tasks.GENERATED:
        tasks[f"pool_{name}_generate"] = make_tasks.GENERATE
    for task, text in tasks.items():
        (HERE / "tasks" / f"{task}.yaml").write_text(text.format(task=task, part="pool", file=file))


if __name__ == "__main__":
    (HERE / "tasks").mkdir(exist_ok=True)
    for skill_name, skill_of_name in skills.SKILLS.items():
        write(skill_name, skill_of_name)
