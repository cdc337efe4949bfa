"""Questions as texts: which set they belong to, and which of them are the same or nearly the same."""

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from llmevo.errors import TaskError, plural
from llmevo.evaluation.standard_errors import Clusters
from llmevo.evaluation.tasks.task import AskingOptions

SHINGLE = 5
"""Words that are compared together."""

NEAR = 0.8
"""The Jaccard similarity of shingles from which on two questions are the same with a few words changed (Broder 1997,
https://doi.org/10.1109/SEQUEN.1997.666900)."""

COMMON = (10, 0.05)
"""Shingles in more questions than the first number, and than the second as a share, tell no question from another."""

Question = tuple[str, str]
"""Its task and its text."""

Compared = tuple[str, str, Sequence[str]]
"""The same, with its choices; none where it has no choices."""

Texts = Mapping[str, Sequence[Sequence[str]]]
"""{task: (question, right answer) of each}, as `RunStarted.texts` has them for each set."""


def select_questions(
    name: str,
    count: int,
    text: Callable[[int], str],
    asking: AskingOptions,
    without: Collection[Sequence[str]] = (),
) -> list[int]:
    """The places of the questions that are asked of a task's `count`, in the order in which they are asked,
    except those whose `words` are in `without`. `text` returns the question at a place.

    Raises TaskError when none is left.
    """
    places = [*range(count)]
    if asking.share:
        low, high = asking.share
        places = [place for place in places if low <= hash_text(text(place), asking.seed) < high]
    if asking.shuffle:
        random.Random(f"{asking.seed}/{name}").shuffle(places)
    end = None if asking.limit is None else asking.after + asking.limit
    places = sorted(places[asking.after : end])
    if without:
        places = [place for place in places if words(text(place)) not in without]
    if places:
        return places
    why = f" after the first {asking.after} of its {count}" if asking.after else ""
    if asking.share:
        low, high = asking.share
        why = f" in the {high - low:.0%} of its {count} that `split` gives one of the sets (shares {low:g} to {high:g})"
        if same := repeated(map(text, range(count))):
            why += f", and {same} of the {count} are repeated, which all go into one set"
    raise TaskError(f"tasks: {name} has no questions{why}; check its split and `limit`")


def blocks(places: Mapping[str, Sequence[int]], count: int) -> list[dict[str, list[int]]]:
    """The questions in so many blocks, each with an equal share of every task, taken from all over it: files are often
    sorted. A task with fewer questions than blocks is in the first one alone.
    """
    number = max(1, min(count, max(map(len, places.values()), default=1)))
    shares = {name: 1 if len(asked) < number else number for name, asked in places.items()}
    return [
        {name: [*asked[block :: shares[name]]] for name, asked in places.items() if block < shares[name]}
        for block in range(number)
    ]


def hash_text(text: str, seed: int) -> float:
    """A number from 0 to 1 that follows from a question's words and the seed: equal questions stay together."""
    digest = hashlib.sha256(f"{seed}/{' '.join(words(text))}".encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


def words(text: str) -> tuple[str, ...]:
    """The words and signs of a question, without case and spacing: `1 - 2` is not `1 + 2`."""
    return tuple(re.findall(r"\w+|[^\w\s]", text.casefold()))


def repeated(texts: Iterable[str]) -> int:
    """The number of questions that are asked before in the same words."""
    keys = [*map(words, texts)]
    return len(keys) - len({*keys})


def with_choices(text: str, choices: Sequence[str]) -> str:
    """A question and its choices, in whatever order it has them."""
    return " / ".join([text, *sorted(choices, key=words)])


def clusters(questions: Iterable[Compared]) -> dict[str, list[int]]:
    """Number the questions: those with the same words are one, asked with choices or without. Equal texts with several
    lists of choices are a question for each list. Questions without a text are all different.
    """
    asked = [(task, words(text), frozenset(map(words, choices))) for task, text, choices in questions]
    lists: dict[tuple[str, ...], set[frozenset[tuple[str, ...]]]] = defaultdict(set)
    for _, text, choices in asked:
        lists[text] |= {choices} if choices else set()
    known: dict[object, int] = {}
    found: dict[str, list[int]] = {}
    for place, (task, text, choices) in enumerate(asked):
        key = (text, choices if len(lists[text]) > 1 else None) if text or choices else place
        found.setdefault(task, []).append(known.setdefault(key, len(known)))
    return found


def clusters_of_texts(texts: Texts) -> Clusters:
    """The same from the texts of a log that has no numbers, without the choices."""
    return clusters((task, question, ()) for task, asked in texts.items() for question, _ in asked)


def check_disjoint(name: str, questions: Iterable[Compared], others: Iterable[Compared]) -> None:
    """Raise TaskError when a question of the set `name` is also one of the others: a score on it would mean nothing.
    Equal texts with other choices are other questions; without choices, a text is the same as with any.
    """
    known: dict[tuple[str, ...], str] = {}
    alone: dict[tuple[str, ...], str] = {}
    texts: dict[tuple[str, ...], str] = {}
    for task, text, choices in others:
        known[words(with_choices(text, choices))] = texts[words(text)] = task
        if not choices:
            alone[words(text)] = task
    shared: list[tuple[str, str]] = []
    for task, text, choices in questions:
        found = known.get(words(with_choices(text, choices))) or (alone if choices else texts).get(words(text))
        shared += [(found, task)] if found else []
    if shared:
        one, other = shared[0]
        raise TaskError(
            f"{name}: {plural(len(shared), f'question of {other} is', f'questions of {other} are')} also searched"
            f" on (task {one}); choose tasks, or splits, that share no question"
        )


def near_duplicates(questions: Iterable[Question], others: Iterable[Question]) -> list[tuple[Question, Question]]:
    """Questions that are nearly among the others, each with the one it is like.

    Texts under ten words are not judged, and other numbers make another question. Words that many of the others share,
    such as an instruction, are not compared.
    """
    known, wanted = [*others], [*questions]
    pieces = [_shingles(text) for _, text in known]
    asked = Counter(shingle for piece in pieces for shingle in piece)
    common = {shingle for shingle, count in asked.items() if count > max(COMMON[0], COMMON[1] * len(known))}
    pieces = [piece - common for piece in pieces]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for place, piece in enumerate(pieces):
        for shingle in piece:
            holders[shingle].append(place)
    found: list[tuple[Question, Question]] = []
    for question in wanted:
        own = _shingles(question[1]) - common
        shared = Counter(place for shingle in own for place in holders.get(shingle, ()))
        for place, count in shared.most_common(5):
            near = count / (len(own) + len(pieces[place]) - count) >= NEAR
            if near and re.findall(r"\d+", question[1]) == re.findall(r"\d+", known[place][1]):
                found.append((question, known[place]))
                break
    return found


def _shingles(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {found[i : i + SHINGLE] for i in range(len(found) - SHINGLE + 1)} if len(found) >= 10 else set()
