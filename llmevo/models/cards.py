"""Excerpts of model cards: the README.md of a model's or an adapter's folder, as the hub has it."""

import re
from pathlib import Path
from typing import Any

from llmevo.models.yaml import read_yaml

LARGEST = 200_000
"""Characters of a card that are read."""

FRONT_MATTER = re.compile(r"\A\s*---\s*\n.*?\n---\s*(?:\n|\Z)", re.DOTALL)
MARKUP = (
    (re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL), " "),
    (re.compile(r"^(```|~~~).*?(?:^\1[^\n]*$|\Z)", re.DOTALL | re.MULTILINE), ""),
    (re.compile(r"!\[[^\]\n]*\](?:\([^)\n]*\)|\[[^\]\n]*\])"), ""),
    (re.compile(r"\[([^\]\n]*)\](?:\([^)\n]*\)|\[[^\]\n]*\])"), r"\1"),
    (re.compile(r"</?[A-Za-z][^<>\n]{0,300}>"), " "),
    (re.compile(r"https?://\S+"), ""),
    (re.compile(r"(?<![\w.:/~-])(?:file:/*|[A-Za-z]:[\\/]|~[\w.-]*/|/)(?:[^\s|`'\"()]+)"), "…"),
    (re.compile(r"[`*]+|(?<!\w)_+|_+(?!\w)"), ""),
)
"""Markup, addresses and places on a machine, with what replaces each."""

TELLING = re.compile(r"\b(?:data|datasets?|corpus|train\w*|fine-?tun\w*|languages?|tasks?|domains?)\b", re.IGNORECASE)
"""Words of the rows of a table that say what a model was trained on."""

PROSE = 40
"""The fewest characters of a paragraph; shorter ones are badges and menus."""


def excerpt(folder: Path, longest: int = 300) -> str:
    """Return the first sentences of a folder's model card, and the rows of its tables that name data or training.

    One line of plain text of at most `longest` characters: without front matter, headings, code, markup, addresses,
    absolute paths and control characters. Empty without a card, or where it has no prose.
    """
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as card:
            return plain(card.read(LARGEST), longest)
    except OSError:
        return ""


def licence(folder: Path) -> str | None:
    """Return the licence in the front matter of a folder's model card; None without one, or with several."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as card:
            head = FRONT_MATTER.match(card.read(LARGEST).replace("\r\n", "\n"))
        content: Any = read_yaml(head[0].strip().removeprefix("---").removesuffix("---")) if head else None
    except (OSError, ValueError):
        return None
    found: Any = content.get("license") if isinstance(content, dict) else None
    names = found if isinstance(found, list) else [found]
    return names[0] if len(names) == 1 and isinstance(names[0], str) and names[0] else None


def plain(card: str, longest: int = 300) -> str:
    """Return the excerpt of a card's text: see `excerpt`."""
    text = FRONT_MATTER.sub("", card.replace("\r\n", "\n"), count=1)
    for pattern, instead in MARKUP:
        text = pattern.sub(instead, text)
    prose, rows = list[str](), list[str]()
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines()]
        rows += [
            _row(line) for line in lines if line.startswith("|") and TELLING.search(line.strip("|").partition("|")[0])
        ]
        words = one_line(" ".join(line for line in lines if not line.startswith(("|", "#", "=", "---"))))
        if len(words) >= PROSE:
            prose.append(words)
    told = shorten(" ".join(prose[:2]), longest * 3 // 5 if rows else longest)
    return shorten("; ".join(filter(None, [told, *rows])), longest)


def shorten(text: str, longest: int) -> str:
    """Cut a text between two words."""
    if len(text) <= longest:
        return text
    return text[: longest - 1].rsplit(" ", 1)[0].rstrip(" ,;:") + "…"


def _row(line: str) -> str:
    """`| data | X |` as `data: X`."""
    cells = [one_line(cell) for cell in line.strip("|").split("|")]
    return ": ".join(filter(None, cells[:3]))


def one_line(text: str) -> str:
    """Return a text in one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
