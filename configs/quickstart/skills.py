"""The four skills of the quickstart: where their questions come from and what their wrong choices are.

Each skill is one family of `reasoning-gym` (https://github.com/open-thought/reasoning-gym, Apache-2.0),
which generates questions with checked answers from a seed. `make_tasks.py` and `train_experts.py` both read
this file, so a question has one wording in training, search and held-out.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, permutations

import reasoning_gym  # pyright: ignore[reportMissingImports]

IMPOSSIBLE = "-1"
"""The family of calendar questions answers so when a month has no fifth Monday; those are left out."""

RELATIONS = [
    *("father", "mother", "son", "daughter", "husband", "wife", "brother", "sister"),
    *("grandfather", "grandmother", "father-in-law", "mother-in-law"),
]


@dataclass(frozen=True)
class Item:
    """One question with its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Skill:
    """A family of questions and how to make wrong answers that look like right ones."""

    family: str
    """The name of the data set in reasoning-gym."""
    distractors: Callable[[str, random.Random], list[str]]
    """All the plausible wrong answers to a right one, best first."""
    variants: list[dict[str, object]] = field(default_factory=lambda: [dict[str, object]()])
    """Settings of the family, drawn from in equal shares: they make the questions short enough for a 135M model."""
    last_line: bool = False
    """Keep only the last line of a question (some families explain the format at length)."""

    def items(self, seed: int, size: int, seen: set[str]) -> list[Item]:
        """`size` items that are not in `seen` (which they join), from one seed.

        Raises ValueError when the family has too few different questions.
        """
        found: list[Item] = []
        sets = [
            reasoning_gym.create_dataset(self.family, seed=seed + place, size=9 * size, **settings)
            for place, settings in enumerate(self.variants)
        ]
        for entry in chain.from_iterable(zip(*sets, strict=True)):
            lines = entry["question"].strip().splitlines()[-1 if self.last_line else 0 :]
            item = Item(question=" ".join(" ".join(lines).split()), answer=entry["answer"].strip())
            if item.question not in seen and item.answer != IMPOSSIBLE:
                seen.add(item.question)
                found.append(item)
            if len(found) == size:
                return found
        raise ValueError(f"{self.family}: only {len(found)} of {size} different questions from seed {seed}")

    def choices(self, item: Item, rng: random.Random, count: int = 4) -> list[str]:
        """The answer and `count` - 1 distractors, shuffled."""
        wrong = [text for text in self.distractors(item.answer, rng) if text != item.answer]
        return rng.sample([item.answer, *wrong[: count - 1]], count)


def near_numbers(answer: str, rng: random.Random) -> list[str]:
    """Off by one, by ten, or by a digit carried wrong."""
    steps = rng.sample([-1, 1, -10, 10, -2, 2, -11, 9], 8)
    return [str(int(answer) + step) for step in steps]


def other_orders(answer: str, rng: random.Random) -> list[str]:
    """The same words in another order; the order of the question (the answer reversed) always among them."""
    words = answer.split(", ")
    orders = [*dict.fromkeys(", ".join(order) for order in permutations(words))]
    question = ", ".join(words[::-1])
    return [question, *rng.sample([order for order in orders if order not in (answer, question)], 3)]


def other_weeks(answer: str, rng: random.Random) -> list[str]:
    """The same weekday in the other weeks of the month."""
    days = [str(day) for day in range(int(answer) % 7, 32, 7) if day > 0]
    return rng.sample([day for day in days if day != answer], 3)


def other_relations(answer: str, rng: random.Random) -> list[str]:
    return rng.sample([relation for relation in RELATIONS if relation != answer], 3)


SKILLS = {
    "arithmetic": Skill(
        "chain_sum", near_numbers, [{"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}]
    ),
    "words": Skill("word_sequence_reversal", other_orders, [{"min_words": 4, "max_words": 4}], last_line=True),
    "family": Skill("family_relationships", other_relations),
    "calendar": Skill(
        "calendar_arithmetic",
        other_weeks,
        [{"tasks": ["recurring_event_day"], "year": year} for year in range(2000, 2030)],
    ),
}
"""The skills by the name of their expert."""

SEEDS = {"search": 1_000, "heldout": 2_000, "training": 3_000, "pool": 100_000}
"""Where each part's items come from, in the order in which they are drawn; none takes an item of those before it. The
pool is what the recipes of `benchmarks/landscapes` are asked.
"""

SIZES = {"search": 64, "heldout": 128, "pool": 200}

MORE_SEEDS = {"search": 200_000, "heldout": 300_000}
"""Of further items of search and held-out, which are drawn after all others: the experts exist already."""

MORE_SIZES = {"search": 64, "heldout": 128}

TRAINED_ON = 2560
"""Items an expert was trained on: 160 steps of 16."""


def digest(question: str) -> str:
    """A short digest of a question, to prove with that it is not among others."""
    return hashlib.sha256(question.encode()).hexdigest()[:12]


def parts(skill: Skill, training: int) -> dict[str, list[Item]]:
    """Search, held-out, training and pool items of a skill: disjoint by question."""
    seen: set[str] = set()
    sizes = {**SIZES, "training": training}
    found = {part: skill.items(seed, sizes[part], seen) for part, seed in SEEDS.items()}
    for part, seed in MORE_SEEDS.items():
        found[part] += skill.items(seed, MORE_SIZES[part], seen)
    return found


def prompt(item: Item) -> str:
    """The text before the answer, as in the `doc_to_text` of the tasks."""
    return f"Question: {item.question}\nAnswer:"
