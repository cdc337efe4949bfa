"""Tokenizers of merged models: checks of the vocabularies, and the chat template of the result."""

import importlib.util
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmevo.errors import RecipeError, SourceError
from llmevo.merging.recipe import Recipe
from llmevo.models.checkpoints import LowRank, Source, Weight
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.models.tokenizer import VOCABULARY, same_tokenizer_file, template_of, vocabulary


class Trimmed(Sources):
    """Models without the embeddings beyond the tokenizer's last token.

    Many models have more rows than tokens, for speed; with a `tokenizer_source` mergekit merges without them.
    """

    def __init__(self, sources: Sources, donor: ModelReference, rows: int) -> None:
        super().__init__(sources.root, sources.base)
        self._whole = sources
        self._rows = rows
        full = int(sources.config(donor).get("vocab_size", 0))
        shapes = sources[donor].shapes.items()
        self._names = {name for name, shape in shapes if VOCABULARY.search(name) and shape[0] == full and full > rows}

    def __getitem__(self, reference: ModelReference) -> Source:
        return _TrimmedSource(self._whole[reference], self._names, self._rows)

    def lent(self, reference: ModelReference) -> Mapping[str, str]:
        return self._whole.lent(reference)

    def layout(self, reference: ModelReference) -> Path:
        return self._whole.layout(reference)

    def config(self, reference: ModelReference) -> dict[str, Any]:
        config = self._whole.config(reference)
        return {**config, "vocab_size": self._rows} if self._names else config


class _TrimmedSource(Source):
    def __init__(self, whole: Source, names: set[str], rows: int) -> None:
        self._whole, self._names, self._rows = whole, names, rows
        self.derived = whole.derived
        self.shapes = {name: (rows, *s[1:]) if name in names else s for name, s in whole.shapes.items()}

    def tensor(self, name: str) -> Tensor:
        tensor = self._whole.tensor(name)
        return tensor[: self._rows] if name in self._names else tensor

    def dtype(self, name: str) -> torch.dtype:
        return self._whole.dtype(name)

    def weight(self, name: str) -> Weight:
        weight = self._whole.weight(name)
        if name not in self._names:
            return weight
        if isinstance(weight, LowRank):
            return LowRank(weight.origin[: self._rows], weight.up[: self._rows], weight.down)
        return weight[: self._rows]


def shared_vocabulary(recipe: Recipe, sources: Sources) -> int | None:
    """Return the number of tokens of the models of a recipe with a `tokenizer_source`; None when there are gaps.

    Raises what `check_vocabularies` raises.
    """
    wanted = check_vocabularies(recipe.tokenizer_donor, recipe.references, sources)
    return len(wanted) if max(wanted.values()) < len(wanted) else None


def check_vocabularies(donor: ModelReference, references: Iterable[ModelReference], sources: Sources) -> dict[str, int]:
    """Return every token of the donor's tokenizer and its number.

    For a `tokenizer_source`: mergekit moves the rows of the embeddings where the numbers differ, llmevo merges models
    of one vocabulary. Raises SourceError when a model's vocabulary differs, and when the donor has no tokenizer.
    """
    first = sources.folder(donor)
    wanted = vocabulary(first)
    if not wanted:
        raise SourceError(
            f"tokenizer_source: {donor} has no tokenizer (no tokenizer.json in {first}); put its files there, name"
            " another model, or leave tokenizer_source out"
        )
    for reference in references:
        other = sources.folder(reference)
        if same_tokenizer_file(first, other):
            continue
        found = vocabulary(other)
        if found and found != wanted:
            token = min(wanted.items() ^ found.items(), key=lambda item: (item[1], item[0]))[0]
            raise SourceError(
                f"tokenizer_source: {donor} and {reference} have different vocabularies: {token!r} is token "
                f"{wanted.get(token, 'none')} of the one, {found.get(token, 'none')} of the other; llmevo merges models"
                " of one vocabulary. Leave tokenizer_source out if that does not matter, or align the models"
                " with mergekit first"
            )
    return wanted


def chat_template(recipe: Recipe, sources: Sources) -> str | None:
    """Return the template of a recipe's `chat_template`: its text, mergekit's of that name, or the commonest."""
    wanted = recipe.chat_template
    if not wanted:
        return None
    if wanted == "auto":
        found = [template for r in recipe.references if (template := template_of(sources.folder(r)))]
        return Counter(found).most_common(1)[0][0] if found else None
    if "{" in wanted:
        return wanted
    spec = importlib.util.find_spec("mergekit")
    for place in (spec.submodule_search_locations or []) if spec else []:
        file = Path(place).resolve() / "_data" / "chat_templates" / f"{wanted}.jinja"
        if file.parent == file.resolve().parent and file.is_file():
            return file.read_text()
    raise RecipeError(
        f"chat_template {wanted!r}: llmevo carries no templates; give the template's own text, or `auto` for the one"
        " most of the models have (mergekit's named ones work where mergekit is installed)"
    )
