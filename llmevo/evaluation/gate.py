"""The gate: a few short replies before the tasks, so that a broken merge costs a few tokens.

A reply is degenerate when it is empty or has no word in it, when it loops, or when it is in a language or a script that
neither the prompts nor the parents' replies to them are in. The parents set the limit: a candidate fails when more of
its replies are degenerate than of any parent's, and more than the set share. Where a parent's replies to most of the
prompts are degenerate, as an expert's to questions of another field, other prompts replace some of them. Where its
replies to those are degenerate as well, the gate warns: see `Gate.warning`.

Languages are identified by py3langid: offline, of 139 languages, and the same every time. Names, numbers and code are
in no language, and a few words may be in many. So only words that begin with a small letter count (or words of a script
without such), a text needs some of them, and the identifier has to be sure: see `LEAST`, `SURE`.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from llmevo.errors import CandidateError, ConfigError, plural

PROMPTS = (
    "Write a short paragraph about the sea.",
    "What is the capital of France?",
    "List three things one needs to bake bread.",
    "Explain in two sentences why the sky is blue.",
    "Tell a story of a fox and a crow in a few sentences.",
    "How many days has a week, and what are they called?",
    "Give one piece of advice to somebody who learns to swim.",
    "What is 12 plus 30?",
)
"""Asked where the tasks have no written replies, or where parents' replies to their questions are degenerate."""

PIECE, REPEATED = 4, 0.5
"""A reply loops when more than this share of its pieces, of so many words, repeat an earlier piece."""

SQUEEZED, JUDGED = 0.3, 64
"""It also loops when it is compressed to less than this share. Replies of fewer bytes do not loop."""

RARE = 0.05
"""Letters of a script that are fewer than this share count as none."""

LEAST = 48
"""Bytes of words with small letters that a text needs for its language to be identified."""

SURE, UNLIKELY = 0.5, 0.05
"""The probability from which on a text is in a language, among 139 of which many are alike, and below which it is
not."""

NONE = "zxx"
"""ISO 639 for a text that is not in a language."""


@dataclass(frozen=True)
class Gate:
    """Asks a model and judges its replies."""

    prompts: Sequence[str]
    tokens: int
    """Of a reply, at most."""
    share: float
    """The share of degenerate replies that is tolerated."""
    chat: bool = False
    """True if prompts are sent as a chat's first turn."""
    scripts: frozenset[str] = frozenset()
    """Scripts of acceptable replies, set by `calibrated`; any where there are none."""
    languages: frozenset[str] = frozenset()
    """The same of languages, as ISO 639 codes."""
    warning: str = ""
    """The reason if the gate stops no candidate, or few; else empty."""

    def calibrated(self, parents: Iterable[tuple[str, Any]]) -> "Gate":
        """The gate that every parent passes, by their names and models. One is asked before the next is taken: they may
        be one live model.
        """
        pool = tuple(dict.fromkeys((*self.prompts, *PROMPTS)))
        said: dict[str, list[str]] = {}
        for name, parent in parents:
            with suppress(CandidateError):  # a parent that says nothing sets no limit
                said[name] = replace(self, prompts=pool).replies(parent)
        faults = {name: [fault(reply) for reply in replies] for name, replies in said.items()}
        places = [*range(len({*self.prompts}))]
        if _worst(faults, places) > self.share:
            places = _answerable(faults, len(pool))
        prompts = [pool[place] for place in places]
        known = [*prompts, *(replies[place] for replies in said.values() for place in places)]
        scripts = frozenset[str]().union(*map(_scripts, known))
        gate = replace(self, prompts=prompts, scripts=scripts, languages=_languages(known))
        found = {name: gate.degenerate([replies[place] for place in places]) for name, replies in said.items()}
        name = max(found, key=lambda name: len(found[name]), default="")
        if not name or len(found[name]) <= self.share * len(places):
            return gate
        many = len(found[name])
        effect = (
            "it is off"
            if many == len(places)
            else f"a candidate fails only when more than {plural(many, 'reply is', 'replies are')}"
        )
        return replace(
            gate,
            share=many / len(places),
            warning=f"gate: {effect}, for of the {len(places)} short replies of {name}, a parent,"
            f" {_summary(found[name])}; name prompts that the parents can reply to (gate.prompts), or take `gate:` out",
        )

    @property
    def idle(self) -> bool:
        """True if every candidate passes."""
        return self.share >= 1

    def check(self, lm: Any) -> None:
        """Raise CandidateError, with the reason and a reply, when too many replies are degenerate."""
        replies = self.replies(lm)
        found = self.degenerate(replies)
        if len(found) > self.share * len(replies):
            raise CandidateError(f"gate: of {len(replies)} short replies {_summary(found)}")

    def replies(self, lm: Any) -> list[str]:
        """The live model's replies, by greedy decoding."""
        from lm_eval.api.instance import Instance  # lm-eval is slow to import

        options = {"until": [], "max_gen_toks": self.tokens, "do_sample": False}
        turns = [[{"role": "user", "content": prompt}] for prompt in self.prompts]
        texts = [lm.apply_chat_template(turn) for turn in turns] if self.chat else self.prompts
        return lm.generate_until([Instance("generate_until", {}, (text, options), 0) for text in texts])

    def degenerate(self, replies: Sequence[str]) -> list[tuple[str, str]]:
        """The degenerate replies, each with its reason."""
        judged = ((reply, fault(reply, self.scripts, self.languages)) for reply in replies)
        return [(reply, reason) for reply, reason in judged if reason]


def _summary(found: Sequence[tuple[str, str]]) -> str:
    """The number of degenerate replies, their reasons, and one of them."""
    reasons = Counter(reason for _, reason in found)
    words = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    sample = next(reply for reply, reason in found if reason == reasons.most_common(1)[0][0])
    return f"{len(found)} are degenerate ({words}), such as {sample[:80]!r}"


def _worst(faults: Mapping[str, Sequence[str]], places: Sequence[int]) -> float:
    """The largest share of degenerate replies that a parent gives at these prompts."""
    return max((sum(bool(own[place]) for place in places) / len(places) for own in faults.values()), default=0.0)


def _answerable(faults: Mapping[str, Sequence[str]], pool: int) -> list[int]:
    """Prompts at which no parent has many faults: one by one, each the one that adds least to the worst parent's."""
    left, found = [*range(pool)], list[int]()

    def added(place: int) -> tuple[float, int]:
        return _worst(faults, [*found, place]), sum(bool(own[place]) for own in faults.values())

    while left and len(found) < len(PROMPTS):
        found.append(min(left, key=added))
        left.remove(found[-1])
    return sorted(found)


def fault(reply: str, scripts: frozenset[str] = frozenset(), languages: frozenset[str] = frozenset()) -> str:
    """The fault of a reply, or an empty text: `empty`, `without a word`, `looping`, `in another language` with its ISO
    639 code, or `in another script`, which finds short replies too, and scraps that are no language.
    """
    if not re.search(r"\w", reply):
        return "without a word" if reply.strip() else "empty"
    if loops(reply):
        return "looping"
    if code := _foreign(reply, languages):
        return f"in another language, {code}"
    letters = _letters(reply)
    strange = sum(count for name, count in letters.items() if name not in scripts)
    return "in another script" if scripts and strange > letters.total() / 2 else ""


def loops(text: str) -> bool:
    """Return whether a text repeats itself again and again."""
    raw = text.encode()
    if len(raw) < JUDGED:
        return False
    words = re.findall(r"\w+|[^\w\s]", text)
    pieces = [tuple(words[i : i + PIECE]) for i in range(len(words) - PIECE + 1)]
    if len(pieces) > 2 * PIECE and 1 - len({*pieces}) / len(pieces) > REPEATED:
        return True
    return len(zlib.compress(raw, 9)) / len(raw) < SQUEEZED


def _letters(text: str) -> Counter[str]:
    """Letters by script, the first word of their Unicode names: LATIN, CYRILLIC, CJK."""
    return Counter(unicodedata.name(letter, "UNKNOWN").split()[0] for letter in text if letter.isalpha())


def _scripts(text: str) -> frozenset[str]:
    letters = _letters(text)
    return frozenset(name for name, count in letters.items() if count >= RARE * letters.total())


def _languages(texts: Sequence[str]) -> frozenset[str]:
    """The ISO 639 codes of the languages of these texts, one by one, or all together where they are short."""
    found = (_probabilities(text) for text in (*texts, " ".join(texts)))
    return frozenset(code for one in found for code, chance in one.items() if chance >= SURE) - {NONE}


def _foreign(text: str, known: frozenset[str]) -> str:
    """The ISO 639 code of a text's language, if it is surely in one and in none of the known; else an empty text. Where
    none is known, none is foreign.
    """
    found = _probabilities(text)
    code = max(found, key=lambda code: found[code], default=NONE)
    if not known or code == NONE or found[code] < SURE:
        return ""
    return code if sum(found.get(one, 0.0) for one in known) < UNLIKELY else ""


def _probabilities(text: str) -> dict[str, float]:
    """Return the probability of every language; empty where the text is too short."""
    words = [word for word in text.split() if not next(filter(str.isalpha, word), "A").isupper()]
    counted = " ".join(words)
    return dict(_identifier().rank(counted)) if len(counted.encode()) >= LEAST else {}


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # reads 5 MB

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def read_prompts(file: Path) -> list[str]:
    """A prompt a line. Raises ConfigError."""
    try:
        prompts = [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"gate.prompts: {file} cannot be read ({error})") from error
    if not prompts:
        raise ConfigError(f"gate.prompts: {file} has no prompts; write one on each line")
    return prompts
