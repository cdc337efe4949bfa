"""The gate: a few short replies before the tasks, so that a merge that only babbles costs a few tokens.

A reply is degenerate when it is empty or has no word in it, when it loops, or when it is in a language or a script that
neither the prompts nor the parents' replies to them are in. What is degenerate is judged by the parents: a candidate
fails when more of its replies are than of any parent's, and more than the set share. Where a parent babbles at most of
the prompts, as experts do on questions that are not theirs, they could tell nothing; then others take the place of some
of them. Where it babbles at those as well the gate says so: see `Gate.warning`.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmevo.errors import CandidateError, ConfigError, plural
from llmevo.evaluation.languages import foreign, languages_of

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
"""What is asked where the tasks have nothing that is replied to in words, or where parents babble at what they have."""


PIECE = 4
"""Words that are compared together."""


REPEATED = 0.5
"""The share of such pieces that repeat an earlier one, from which on a reply loops."""


SQUEEZED = 0.3
"""The same of a text without spaces: the size it is compressed to."""


JUDGED = 64
"""Bytes that a reply has before it can loop."""


RARE = 0.05
"""Letters of a script that are fewer than this share count as none."""


@dataclass(frozen=True)
class Gate:
    """Asks a model and judges its replies."""

    prompts: Sequence[str]
    tokens: int
    """Of a reply, at most."""
    share: float
    """Of degenerate replies that is let pass."""
    chat: bool = False
    """Whether prompts are sent as a chat's first turn."""
    scripts: frozenset[str] = frozenset()
    """That replies may be in, or any where there are none; `calibrated` knows them."""
    languages: frozenset[str] = frozenset()
    """The same, as ISO 639 codes."""
    warning: str = ""
    """Why it stops nothing, or little; empty where the parents themselves give no cause for it."""

    def calibrated(self, parents: Iterable[tuple[str, Any]]) -> "Gate":
        """The gate that every parent passes, of names and models. One is asked before the next is taken: they may be
        one live model.
        """
        pool = tuple(dict.fromkeys((*self.prompts, *PROMPTS)))
        said = {name: replace(self, prompts=pool).replies(parent) for name, parent in parents}
        faults = {name: [fault(reply) for reply in replies] for name, replies in said.items()}
        places = [*range(len(self.prompts))]
        if _worst(faults, places) > self.share:
            places = _telling(faults, [*range(len(pool))], len(PROMPTS))
        prompts = [pool[place] for place in places]
        known = [*prompts, *(replies[place] for replies in said.values() for place in places)]
        scripts = frozenset[str]().union(*map(scripts_of, known))
        gate = replace(self, prompts=prompts, scripts=scripts, languages=languages_of(known))
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
            warning=f"gate: {effect}, for of the {len(places)} short replies of {name}, a parent, {_told(found[name])};"
            " name prompts that the parents can reply to (gate.prompts), or take `gate:` out",
        )

    @property
    def idle(self) -> bool:
        """Whether it lets everything pass."""
        return self.share >= 1

    def check(self, lm: Any) -> None:
        """Raise CandidateError, with the reason and a reply, when too many replies are degenerate."""
        replies = self.replies(lm)
        found = self.degenerate(replies)
        if len(found) > self.share * len(replies):
            raise CandidateError(f"gate: of {len(replies)} short replies {_told(found)}")

    def replies(self, lm: Any) -> list[str]:
        """What the live model says, greedily."""
        from lm_eval.api.instance import Instance  # lm-eval is slow to import

        options = {"until": [], "max_gen_toks": self.tokens, "do_sample": False}
        turns = [[{"role": "user", "content": prompt}] for prompt in self.prompts]
        texts = [lm.apply_chat_template(turn) for turn in turns] if self.chat else self.prompts
        return lm.generate_until([Instance("generate_until", {}, (text, options), 0) for text in texts])

    def degenerate(self, replies: Sequence[str]) -> list[tuple[str, str]]:
        """Those that are, each with its reason."""
        judged = ((reply, fault(reply, self.scripts, self.languages)) for reply in replies)
        return [(reply, reason) for reply, reason in judged if reason]


def _told(found: Sequence[tuple[str, str]]) -> str:
    """How many are degenerate and why, with one of them."""
    reasons = Counter(reason for _, reason in found)
    words = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    sample = next(reply for reply, reason in found if reason == reasons.most_common(1)[0][0])
    return f"{len(found)} are degenerate ({words}), such as {sample[:80]!r}"


def _worst(faults: Mapping[str, Sequence[str]], places: Sequence[int]) -> float:
    """The largest share of degenerate replies that a parent gives at these prompts."""
    return max((sum(bool(own[place]) for place in places) / len(places) for own in faults.values()), default=0.0)


def _telling(faults: Mapping[str, Sequence[str]], left: list[int], count: int) -> list[int]:
    """So many prompts at which no parent has many faults: one by one, whichever adds least to the worst parent's."""
    found: list[int] = []

    def added(place: int) -> tuple[float, int]:
        return _worst(faults, [*found, place]), sum(bool(own[place]) for own in faults.values())

    while left and len(found) < count:
        found.append(min(left, key=added))
        left.remove(found[-1])
    return sorted(found)


def fault(reply: str, scripts: frozenset[str] = frozenset(), languages: frozenset[str] = frozenset()) -> str:
    """What is wrong with a reply, or nothing: `empty`, `without a word`, `looping`, `in another language` with its
    ISO 639 code, or `in another script`, which tells short replies too, and scraps that are no language.
    """
    if not re.search(r"\w", reply):
        return "without a word" if reply.strip() else "empty"
    if loops(reply):
        return "looping"
    if code := foreign(reply, languages):
        return f"in another language, {code}"
    letters = Counter(map(script, filter(str.isalpha, reply)))
    strange = sum(count for name, count in letters.items() if name not in scripts)
    return "in another script" if scripts and strange > letters.total() / 2 else ""


def loops(text: str) -> bool:
    """Whether a text says the same again and again."""
    raw = text.encode()
    if len(raw) < JUDGED:
        return False
    words = re.findall(r"\w+|[^\w\s]", text)
    pieces = [tuple(words[i : i + PIECE]) for i in range(len(words) - PIECE + 1)]
    if len(pieces) > 2 * PIECE and 1 - len({*pieces}) / len(pieces) > REPEATED:
        return True
    return len(zlib.compress(raw, 9)) / len(raw) < SQUEEZED


def scripts_of(text: str) -> frozenset[str]:
    """The scripts that a text is in."""
    letters = Counter(map(script, filter(str.isalpha, text)))
    return frozenset(name for name, count in letters.items() if count >= RARE * letters.total())


def script(letter: str) -> str:
    """The script of a letter, which its Unicode name begins with: LATIN, CYRILLIC, CJK."""
    return unicodedata.name(letter, "UNKNOWN").split()[0]


def read_prompts(file: Path) -> list[str]:
    """A prompt a line. Raises ConfigError."""
    try:
        prompts = [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"gate.prompts: {file} cannot be read ({error})") from error
    if not prompts:
        raise ConfigError(f"gate.prompts: {file} has no prompts; write one on each line")
    return prompts
