"""Which questions belong to which set, so that none is searched on and reported on."""

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from llmevo.errors import TaskError, plural
from llmevo.evaluation.tasks.task import AskingOptions
from llmevo.evaluation.tasks.wording import wording

SHINGLE = 5
"""Words that are compared together."""


NEAR = 0.8
"""The Jaccard similarity of shingles from which on two questions are the same with a few words changed (Broder 1997,
https://doi.org/10.1109/SEQUEN.1997.666900)."""


Question = tuple[str, str]
"""Its task and its text."""


def chosen(name: str, leaf: Any, protocol: AskingOptions, without: Collection[Sequence[str]] = ()) -> list[int]:
    """The places of the questions that a protocol takes of a task, in the order in which they are asked, but for those
    whose `words` are in `without`.

    Raises TaskError when none is left.
    """
    documents = leaf.eval_docs
    places = [*range(len(documents))]
    if protocol.share:
        low, high = protocol.share
        places = [p for p in places if low <= hashed(wording(leaf, documents[p]), protocol.seed) < high]
    if protocol.shuffle:
        random.Random(f"{protocol.seed}/{name}").shuffle(places)
    end = None if protocol.limit is None else protocol.after + protocol.limit
    places = sorted(places[protocol.after : end])
    if without:
        places = [place for place in places if words(wording(leaf, documents[place])) not in without]
    if not places:
        why = _why(protocol, len(documents))
        raise TaskError(f"tasks: {name} has no questions{why}; check its split and `limit`")
    return places


def _why(protocol: AskingOptions, count: int) -> str:
    if protocol.share:
        low, high = protocol.share
        return (
            f" in the {high - low:.0%} of its {count} that `split` gives one of the sets (shares {low:g} to {high:g})"
        )
    return f" after the first {protocol.after} of its {count}" if protocol.after else ""


def blocks(places: Mapping[str, Sequence[int]], count: int) -> list[dict[str, list[int]]]:
    """The questions in so many parts, each with an equal share of every task, taken from all over it: files are often
    sorted. A task with fewer questions than parts is in the first part alone.
    """
    number = max(1, min(count, max(map(len, places.values()), default=1)))
    shares = {name: 1 if len(asked) < number else number for name, asked in places.items()}
    return [
        {name: [*asked[part :: shares[name]]] for name, asked in places.items() if part < shares[name]}
        for part in range(number)
    ]


def hashed(text: str, seed: int) -> float:
    """A number from 0 to 1 that follows from a question's words and the seed: equal questions stay together."""
    digest = hashlib.sha256(f"{seed}/{' '.join(words(text))}".encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


def words(text: str) -> tuple[str, ...]:
    """What a question says, without case and spacing. Signs stay: `1 - 2` is not `1 + 2`."""
    return tuple(re.findall(r"\w+|[^\w\s]", text.casefold()))


def check_disjoint(name: str, questions: Iterable[Question], others: Iterable[Question]) -> None:
    """Raise TaskError when a question of the set `name` is also one of the others: a score on it would mean nothing."""
    known = {words(text): task for task, text in others}
    shared = [(known[key], task) for task, text in questions if (key := words(text)) in known]
    if shared:
        one, other = shared[0]
        raise TaskError(
            f"{name}: {plural(len(shared), f'question of {other} is', f'questions of {other} are')} also searched"
            f" on (task {one}); choose tasks, or splits,"
            " that share no question"
        )


def near_duplicates(questions: Iterable[Question], others: Iterable[Question]) -> list[tuple[Question, Question]]:
    """Questions that are nearly among the others, each with the one it is like.

    Texts under ten words are not judged, and other numbers make another question.
    """
    known: list[Question] = []
    pieces: list[set[tuple[str, ...]]] = []
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for question in others:
        shingles = _shingles(question[1])
        for shingle in shingles:
            holders[shingle].append(len(known))
        known.append(question)
        pieces.append(shingles)
    found: list[tuple[Question, Question]] = []
    for question in questions:
        own = _shingles(question[1])
        shared = Counter(place for shingle in own for place in holders.get(shingle, ()))
        for place, count in shared.most_common(5):
            near = count / (len(own) + len(pieces[place]) - count) >= NEAR
            if near and _numbers(question[1]) == _numbers(known[place][1]):
                found.append((question, known[place]))
                break
    return found


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def _shingles(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {found[i : i + SHINGLE] for i in range(len(found) - SHINGLE + 1)} if len(found) >= 10 else set()
