"""The tokenizer of a merged model: its files, its number of tokens, and its chat template."""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmevo.errors import RecipeError, SourceError
from llmevo.merging.recipe import Recipe
from llmevo.merging.vocabulary import Vocabulary, tokenizer_folder
from llmevo.models.checkpoints import LowRank, Source, Weight, read_object
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources, View
from llmevo.models.tokenizer import (
    VOCABULARY,
    load_tokenizer,
    template_of,
    vocabulary,
    vocabulary_size,
    with_vocabulary_size,
)


class Trimmed(View):
    """Models without the embeddings beyond the tokenizer's last token.

    Many models have more rows than tokens, for speed; with a `tokenizer_source` mergekit merges without them.
    """

    def __init__(self, sources: Sources, donor: ModelReference, rows: int) -> None:
        super().__init__(sources)
        self._rows = rows
        full = vocabulary_size(sources.config(donor))
        shapes = sources[donor].shapes.items()
        self._names = {name for name, shape in shapes if VOCABULARY.search(name) and shape[0] == full and full > rows}

    def __getitem__(self, reference: ModelReference) -> Source:
        return _TrimmedSource(self.whole[reference], self._names, self._rows)

    def config(self, reference: ModelReference) -> dict[str, Any]:
        config = self.whole.config(reference)
        return with_vocabulary_size(config, self._rows) if self._names else config


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


def token_count(donor: ModelReference, sources: Sources) -> int | None:
    """Return the number of tokens of a model's tokenizer; None when numbers below it belong to no token."""
    folder = tokenizer_folder(donor, sources)
    # As transformers loads it: it may add tokens that only tokenizer_config.json names.
    tokens: dict[str, int] = {**load_tokenizer(folder).get_vocab()} if vocabulary(folder) else {}
    return len(tokens) if tokens and max(tokens.values()) < len(tokens) else None


def write_tokenizer(of: Vocabulary, folder: Path) -> None:
    """Add the tokens of a merged model to the files of its donor's tokenizer, copied into `folder`.

    Raises SourceError when transformers does not load from them exactly these tokens, or when a special token is not
    read back as itself.
    """
    if of.added:
        _add_tokens(of, folder)
    loaded = load_tokenizer(folder)
    found: dict[str, int] = dict(loaded.get_vocab())
    if wrong := min(of.numbers.items() ^ found.items(), key=lambda item: (item[1], item[0]), default=None):
        token = wrong[0]
        raise SourceError(
            f"tokenizer_source: the tokenizer of {of.donor} cannot be extended: {token!r} should be token"
            f" {of.numbers.get(token, 'none')} of the merged model, and transformers loads it as"
            f" {found.get(token, 'none')}; name another model as tokenizer_source, or save its tokenizer again with"
            " transformers' save_pretrained"
        )
    special = [*loaded.all_special_tokens, *(token.content for token in of.added if token.special)]
    for token in dict.fromkeys(special):
        number = found[token]
        text: str = loaded.decode([number], skip_special_tokens=False)
        again: list[int] = loaded.encode(text, add_special_tokens=False)
        if again != [number]:
            raise SourceError(
                f"tokenizer_source: the special token {token!r} of the merged model is token {number}, and its text"
                f" {text!r} is read as {again}; correct it in the tokenizer of the model that has it"
            )


def _add_tokens(of: Vocabulary, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    file, config, listed = (folder / f"{n}.json" for n in ("tokenizer", "tokenizer_config", "added_tokens"))
    if not file.exists():  # vocab.json or tokenizer.model
        whole = load_tokenizer(folder)
        whole.add_tokens([*of.added])
        whole.save_pretrained(folder)
        return
    tokenizer = Tokenizer.from_file(str(file))
    held = tokenizer.get_vocab(with_added_tokens=True)
    own = len(of.numbers) - len(of.added)
    # Of the donor's tokens transformers may find some in tokenizer_config.json only; they come first.
    missing = sorted((n, t) for t, n in [*of.numbers.items()][:own] if t not in held)
    for token in [*(AddedToken(text, special=True, normalized=False) for _, text in missing), *of.added]:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    tokenizer.save(str(file))
    if len(of.numbers) <= max(of.numbers.values()):
        _set_numbers(of, file)
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    if config.exists():
        content = read_object(config)
        if isinstance(content.get("added_tokens_decoder"), dict):
            for token in of.added:
                content["added_tokens_decoder"][str(of.numbers[token.content])] = {f: getattr(token, f) for f in flags}
            config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if listed.exists():
        numbers = {**read_object(listed), **{token.content: of.numbers[token.content] for token in of.added}}
        listed.write_text(json.dumps(numbers, indent=2, ensure_ascii=False) + "\n")


def _set_numbers(of: Vocabulary, file: Path) -> None:
    """Give every added token its number in a tokenizer.json some of whose numbers belong to no token.

    The library counts tokens when it reads the file, unless the tokenizer's model has the added token as well.
    """
    content = read_object(file)
    for token in content["added_tokens"]:
        token["id"] = of.numbers[token["content"]]
        if isinstance(content["model"].get("vocab"), dict):
            content["model"]["vocab"][token["content"]] = token["id"]
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def chat_template(recipe: Recipe, sources: Sources) -> str | None:
    """Return the template of a recipe's `chat_template`: its text, mergekit's of that name, or the commonest."""
    wanted = recipe.chat_template
    if not wanted:
        return None
    if wanted == "auto":
        found = [template for r in recipe.references if (template := template_of(tokenizer_folder(r, sources)))]
        return Counter(found).most_common(1)[0][0] if found else None
    if "{" in wanted:
        return wanted
    spec = importlib.util.find_spec("mergekit")
    for place in (spec.submodule_search_locations or []) if spec else []:
        file = Path(place).resolve() / "_data" / "chat_templates" / f"{wanted}.jinja"
        if file.parent == file.resolve().parent and file.is_file():
            return file.read_text()
    raise RecipeError(
        f"chat_template {wanted!r}: llmevo includes no templates; give the template's own text, or `auto` for the one"
        " most of the models have (mergekit's named ones work where mergekit is installed)"
    )
