"""Write the quickstart's lm-eval tasks: `python configs/quickstart/make_tasks.py`.

For every skill two multiple-choice tasks, `quickstart_SKILL` (search) and `quickstart_SKILL_heldout`, and for
arithmetic also two generate-and-match tasks, `quickstart_arithmetic_generate[_heldout]`. The same seed writes the
same files. Search, held-out and training share no question; `tests/test_quickstart.py` proves it of the files, for
training of the digests of its questions.
"""

import json
import random
from pathlib import Path

import skills

HERE = Path(__file__).parent / "tasks"
GENERATED = "arithmetic"
"""The skill that is also asked without choices."""

CHOICE = """\
task: {task}
tag: quickstart_{part}
custom_dataset: !function data.load
dataset_kwargs:
  file: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""

GENERATE = """\
task: {task}
tag: quickstart_{part}
custom_dataset: !function data.load
dataset_kwargs:
  file: {file}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
filter_list:
  - name: number
    filter:
      - function: regex
        regex_pattern: "(-?\\\\d+)"
      - function: take_first
metadata:
  version: 1
"""


def write(name: str, skill: skills.Skill) -> None:
    """The data and task files of one skill."""
    for part, items in skills.parts(skill, training=skills.TRAINED_ON).items():
        if part == "training":
            digests = "".join(f"{skills.digest(item.question)}\n" for item in items)
            (HERE / f"{name}.training.sha256").write_text(digests)
            continue
        if part == "pool":  # for `benchmarks/landscapes/make_pool.py`
            continue
        rng = random.Random(f"{name}/{part}")
        rows = []
        for item in items:
            choices = skill.choices(item, rng)
            rows.append({"question": item.question, "choices": choices, "answer": choices.index(item.answer)})
        file = f"{name}.{part}.jsonl"
        (HERE / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        ending = "" if part == "search" else f"_{part}"
        tasks = {f"quickstart_{name}{ending}": CHOICE}
        if name == GENERATED:
            tasks[f"quickstart_{name}_generate{ending}"] = GENERATE
        for task, text in tasks.items():
            (HERE / f"{task}.yaml").write_text(text.format(task=task, part=part, file=file))


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for skill_name, skill_of_name in skills.SKILLS.items():
        write(skill_name, skill_of_name)
