"""The vocabulary of a merged model, and the embeddings of its models by token instead of by row number."""

import hashlib
import json
import mmap
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmevo.errors import SourceError, plural
from llmevo.merging.recipe import Recipe, TokenRow, TokenSource
from llmevo.models.architecture import stack_of
from llmevo.models.checkpoints import LowRank, Source, Weight, read_object, same, stored
from llmevo.models.references import ModelReference, folder_of
from llmevo.models.sources import Excludes, Sources, View
from llmevo.models.tokenizer import (
    TOKENIZERS,
    VOCABULARY,
    load_tokenizer,
    same_tokenizer_file,
    template_of,
    vocabulary,
    vocabulary_size,
    with_vocabulary_size,
)

CHUNK = 1 << 22
"""Entries that are gathered at a time."""

NONE = -1
"""The row of a token that a model does not have."""

Row = tuple[ModelReference, int]
"""A model and a row of its embeddings."""


@dataclass(frozen=True)
class _Tokens:
    """The tokens of one model's tokenizer."""

    numbers: Mapping[str, int]
    added: Mapping[str, Any]
    """Those added after its training, as `tokenizers.AddedToken`, in the order of their numbers."""

    @cached_property
    def trained(self) -> set[str]:
        return {*self.numbers} - {*self.added}


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a merged model, and the rows that each of its models has for them.

    The tokens of the donor keep their numbers; added ones follow. A model without a token takes the row of the base, or
    of the only model that has it, or the mean of the rows of all that have it. A number that belongs to no token of
    the donor keeps the donor's row.
    """

    donor: ModelReference
    """The model whose tokenizer the result gets, with `added`."""
    numbers: Mapping[str, int]
    """Every token and its number."""
    added: Sequence[Any]
    """The tokens that the donor lacks, as `tokenizers.AddedToken`, in the order of their numbers."""
    size: int
    """Rows of the result's embeddings, those of padding included."""
    rows: Mapping[ModelReference, Tensor]
    """(numbers,), int64: each model's row for each number, or -1."""
    filled: Mapping[int, Sequence[Row]]
    """{number: the rows whose mean replaces a missing one}, for each number that a model lacks; no rows for zeros."""

    @classmethod
    def of(cls, recipe: Recipe, sources: Sources) -> "Vocabulary":
        """Read the tokenizers of a recipe's models. Raises SourceError that names the model and the token."""
        donor, references = recipe.tokenizer_donor, recipe.references
        every = _read_tokens(donor, references, sources)
        wanted = every[donor]
        for reference in references:
            _check_trained(donor, reference, every)
        numbers = dict(wanted.numbers)
        end = max(numbers.values()) + 1
        listed = recipe.tokenizer.tokens or {} if recipe.tokenizer else {}
        united = references if recipe.vocabulary_source == "union" else []
        added: dict[str, Any] = {}
        for tokens in (*(every[reference].added for reference in united), {token: _plain(token) for token in listed}):
            for text, token in tokens.items():
                if text not in numbers:
                    added.setdefault(text, token)
        numbers |= {token: end + place for place, token in enumerate(added)}
        end += len(added)
        rows = {
            reference: torch.full((end,), NONE, dtype=torch.int64).index_copy_(0, *_places(numbers, tokens.numbers))
            for reference, tokens in every.items()
            if reference in references
        }
        gaps = torch.ones(end, dtype=torch.bool).index_fill_(0, torch.tensor([*numbers.values()]), False)
        if donor in rows:
            rows[donor] = torch.where(gaps, torch.arange(end), rows[donor])
        multiple = (recipe.tokenizer.pad_to_multiple_of if recipe.tokenizer else None) or 1
        filled = _filled(recipe, numbers, rows, every, gaps, sources)
        for number in (numbers[token] for token, row in listed.items() if row.force):
            for own in rows.values():
                own[number] = NONE
        return cls(donor, numbers, [*added.values()], -(-end // multiple) * multiple, rows, filled)

    @cached_property
    def digest(self) -> str:
        """A digest of all tokens and of the rows that stand for them."""
        digest = hashlib.sha256(json.dumps([self.size, sorted(self.numbers.items())]).encode())
        for reference, rows in self.rows.items():
            digest.update(str(reference).encode() + rows.numpy().tobytes())
        filled = [(number, [(str(model), row) for model, row in rows]) for number, rows in self.filled.items()]
        digest.update(json.dumps(filled).encode())
        return digest.hexdigest()


def by_token(recipe: Recipe, sources: Sources) -> "ByToken | None":
    """Return the models of a recipe with a `tokenizer_source` by token; None where their tokens and rows are the same.

    Raises SourceError when the donor has no tokenizer, and what `Vocabulary.of` raises.
    """
    if recipe.vocabulary_source is None:
        return None
    if isinstance(sources, ByToken):
        return sources
    donor = recipe.tokenizer_donor
    first = tokenizer_folder(donor, sources)
    wanted = vocabulary(first)
    if not wanted:
        raise SourceError(
            f"tokenizer_source: {donor} has no tokenizer (no tokenizer.json in {first}); put its files there, name"
            " another model, or leave tokenizer_source out"
        )
    if recipe.tokenizer or any(_differs(donor, wanted, reference, sources) for reference in recipe.references):
        return ByToken(sources, Vocabulary.of(recipe, sources))
    return None


def open_models(recipe: Recipe, root: Path = Path(), excludes: Excludes | None = None) -> Sources:
    """Open the models of a recipe, by token where it has a `tokenizer_source` and their tokens differ.

    `excludes` says whether the user leaves a tensor of a model out on purpose. Raises SourceError unless they have the
    same tensors in the same shapes then.
    """
    sources: Sources = Sources.unchecked(recipe.references, root, excludes)
    if recipe.vocabulary_source is None:
        sources.check(recipe.references)
        return sources
    sources.check(recipe.references, rows=False)  # models of another architecture are refused as such
    sources = by_token(recipe, sources) or sources
    sources.check(recipe.references)
    return sources


def tokenizer_folder(reference: ModelReference, sources: Sources) -> Path:
    """Return the folder with a model's tokenizer: that of an adapter where it has one, and where it changes the number
    of rows. A tokenizer beside an adapter that has more tokens than rows is not used.
    """
    model, without = sources.folder(reference), sources.without_adapter(reference)
    if without == reference:
        return model
    adapter, rows = folder_of(reference.lora or reference.model, sources.root), _rows(reference, sources)
    if rows != _rows(without, sources):
        return adapter
    config = adapter / "tokenizer_config.json"
    if not any((adapter / name).exists() for name in TOKENIZERS) or not config.exists():
        return model
    if not read_object(config).get("tokenizer_class"):  # transformers takes it from config.json then
        return model
    if same_tokenizer_file(adapter, model) and template_of(adapter) == template_of(model):
        return model
    return adapter if max(vocabulary(adapter).values(), default=0) < min(rows.values(), default=0) else model


class ByToken(View):
    """The models with their embeddings by token: row n of each is that of token n of the merged model.

    Shapes, config and weights are those of the merged model's vocabulary. A table of rows is made once, when it is
    first read, in a temporary file without a name, so that it takes no memory that the system cannot have back.
    """

    def __init__(self, sources: Sources, vocabulary: Vocabulary) -> None:
        super().__init__(sources)
        self.vocabulary = vocabulary
        self._aligned: dict[ModelReference, _ByTokenSource] = {}
        self._tables: dict[tuple[ModelReference | Path, str], Tensor] = {}
        self._making = threading.Lock()
        self._names = {reference: _checked_names(reference, sources, vocabulary) for reference in vocabulary.rows}
        folders = {of: sources.folder(of) for of in vocabulary.rows}
        self._models = {
            of: at.resolve() for of, at in folders.items() if same_tokenizer_file(tokenizer_folder(of, sources), at)
        }

    def __getitem__(self, reference: ModelReference) -> Source:
        if reference not in self._names:
            raise SourceError(f"{reference}: is no model of the merge whose vocabulary this is")
        if reference not in self._aligned:
            self._aligned[reference] = _ByTokenSource(self, reference, self._names[reference])
        return self._aligned[reference]

    def config(self, reference: ModelReference) -> dict[str, Any]:
        return with_vocabulary_size(self.whole.config(reference), self.vocabulary.size)

    def weight(self, reference: ModelReference, name: str) -> Weight:
        """Return a weight with one row a token."""
        weight = self.whole[reference].weight(name)
        if isinstance(weight, Tensor):
            return self._table(reference, name, weight)
        rows = self.vocabulary.rows[reference].clone()
        for number, origins in self.vocabulary.filled.items():
            if [*origins] == [(reference, int(rows[number]))]:
                rows[number] = NONE  # the others have this row rounded, and it is to be the same in all
        has = rows != NONE
        up = weight.up.new_zeros(self.vocabulary.size, weight.up.shape[1])
        up[: len(rows)][has] = weight.up[rows[has]]
        origin = self._table(reference, name, weight.origin, rows)
        if self.vocabulary.size > len(rows):  # padding is the mean of all rows, and so are its factors
            up[len(rows) :] = up[: len(rows)].mean(0)
        return LowRank(origin, up, weight.down)

    def _table(self, reference: ModelReference, name: str, own: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return one model's stored rows in the order of the merged vocabulary."""
        whose: ModelReference | Path = reference
        if rows is None:
            rows = self.vocabulary.rows[reference]
            plain = self.whole.without_adapter(reference)
            if reference in self._models and same(own, self.whole[plain].tensor(name)):
                whose = self._models[reference]  # adapters that leave the embeddings alone share those of their model
        size, count = self.vocabulary.size, len(rows)
        if size == count and torch.equal(rows, torch.arange(count)):
            return own[:size]
        with self._making:  # tensors are merged side by side
            if (whose, name) not in self._tables:
                self._tables[whose, name] = self._new_table(name, own, rows)
            return self._tables[whose, name]

    def _new_table(self, name: str, own: Tensor, rows: Tensor) -> Tensor:
        size, count, dtype = self.vocabulary.size, len(rows), own.dtype
        for other in self.vocabulary.rows:
            dtype = torch.promote_types(dtype, stored(self.whole[other].weight(name)).dtype)
        table = _in_file((size, *own.shape[1:]), dtype)
        _gather(own, rows, table)
        for number in torch.nonzero(rows == NONE).flatten().tolist():
            table[number] = self._mean(self.vocabulary.filled[number], name, table[number])
        if size > count:
            table[count:] = _mean_row(table[:count])
        return table

    def _mean(self, origins: Sequence[Row], name: str, like: Tensor) -> Tensor:
        """Return the mean of some models' rows, in float32 and rounded to the table's type; zeros without any."""
        found = [_row(self.whole[model].weight(name), row) for model, row in origins]
        if len(found) == 1:
            return found[0].to(like.dtype)
        total = torch.zeros_like(like, dtype=torch.float32)
        for row in found:
            total += row
        return (total / max(1, len(found))).to(like.dtype)


def plain(sources: Sources) -> Sources:
    """Return the models as they are stored."""
    return sources.whole if isinstance(sources, ByToken) else sources


class _ByTokenSource(Source):
    def __init__(self, models: ByToken, reference: ModelReference, names: set[str]) -> None:
        self._models, self._reference, self._names = models, reference, names
        whole, size = models.whole[reference], models.vocabulary.size
        self._whole, self.derived = whole, whole.derived
        self.shapes = {name: (size, *s[1:]) if name in names else s for name, s in whole.shapes.items()}

    def tensor(self, name: str) -> Tensor:
        if name not in self._names:
            return self._whole.tensor(name)
        weight = self.weight(name)
        return weight.dense() if isinstance(weight, LowRank) else weight

    def weight(self, name: str) -> Weight:
        return self._models.weight(self._reference, name) if name in self._names else self._whole.weight(name)

    def dtype(self, name: str) -> torch.dtype:
        return super().dtype(name) if name in self._names else self._whole.dtype(name)


def _differs(donor: ModelReference, wanted: Mapping[str, int], reference: ModelReference, sources: Sources) -> bool:
    """Return whether a model has other tokens or another number of rows than the donor."""
    first, other = tokenizer_folder(donor, sources), tokenizer_folder(reference, sources)
    if not same_tokenizer_file(first, other) and vocabulary(other) not in ({}, wanted):
        return True
    here, there = _rows(donor, sources), _rows(reference, sources)
    return any(here[name] != there[name] for name in here.keys() & there.keys())


def _rows(reference: ModelReference, sources: Sources) -> dict[str, int]:
    """Return the number of rows of each weight that has one row a token."""
    return {name: shape[0] for name, shape in sources[reference].shapes.items() if VOCABULARY.search(name)}


def _checked_names(reference: ModelReference, sources: Sources, of: Vocabulary) -> set[str]:
    """Return the names of a model's weights with one row a token.

    Raises SourceError when one has too few rows, or is not known to have one row a token though it looks so.
    """
    config = sources.config(reference)
    size, stack = vocabulary_size(config), stack_of(config, sources[reference].shapes)
    names: set[str] = set()
    last = int(of.rows[reference].max())
    for name, shape in sources[reference].shapes.items():
        if VOCABULARY.search(name):
            names.add(name)
            if last >= shape[0]:
                token = next((t for t, n in of.numbers.items() if of.rows[reference][n] == last), "")
                raise SourceError(
                    f"tokenizer_source: {reference} has the token {token!r} as number {last}, and {name} has only"
                    f" {shape[0]} rows; take that token out of its tokenizer, or resize the model's embeddings"
                )
        elif (size in shape or "per_layer" in name) and not stack.predicts(name):
            raise SourceError(
                f"tokenizer_source: {reference}: {name} {shape} has a row for each token as well, which llmevo does not"
                " move to another number; leave out the models whose tokens differ from those of the first one"
            )
    return names


def _read_tokens(
    donor: ModelReference, references: Sequence[ModelReference], sources: Sources
) -> dict[ModelReference, _Tokens]:
    """Return the tokens of each model; a model without a tokenizer is taken to have the donor's."""
    by_folder: dict[Path, _Tokens] = {}
    found: dict[ModelReference, _Tokens] = {}
    for reference in (donor, *references):
        folder = tokenizer_folder(reference, sources)
        known = next((one for one in by_folder if same_tokenizer_file(one, folder)), None)
        if known is None and not vocabulary(folder):
            if _rows(reference, sources) != _rows(donor, sources):
                rows = max(_rows(reference, sources).values(), default=0)
                raise SourceError(
                    f"tokenizer_source: {reference} has no tokenizer (no tokenizer.json in {folder}), so it is unknown"
                    f" which tokens its {rows} rows are of; put the tokenizer's files there"
                )
            known = tokenizer_folder(donor, sources)
        if known is None:
            by_folder[folder] = _tokens_in(reference, folder)
        found[reference] = by_folder[known or folder]
    return found


def _tokens_in(reference: ModelReference, folder: Path) -> _Tokens:
    """Read the tokens of a tokenizer as transformers loads it, which may be more than tokenizer.json lists."""
    loaded = load_tokenizer(folder)
    numbers: dict[str, int] = dict(loaded.get_vocab())
    owners: dict[int, str] = {}
    for token, number in numbers.items():
        if (other := owners.setdefault(number, token)) != token:
            raise SourceError(
                f"tokenizer_source: {reference}: the tokens {other!r} and {token!r} of its tokenizer have the same"
                f" number, {number} ({folder}); download the tokenizer again"
            )
    decoder: Mapping[int, Any] = loaded.added_tokens_decoder
    return _Tokens(numbers, {decoder[number].content: decoder[number] for number in sorted(decoder)})


def _check_trained(donor: ModelReference, reference: ModelReference, every: Mapping[ModelReference, _Tokens]) -> None:
    """Raise SourceError for a model with tokens that the donor lacks and that were not added after training.

    A tokenizer needs merges or scores for these; as added tokens they would be found in other places of a text.
    """
    strange = every[reference].trained - {*every[donor].numbers}
    if not strange:
        return
    first = min(strange, key=lambda token: every[reference].numbers[token])
    larger = [str(r) for r in every if all(other.trained <= {*every[r].numbers} for other in every.values())]
    ways_out = f"leave {reference} out"
    if larger:
        ways_out += f", or give tokenizer_source: {larger[0]}, which has the tokens of all"
    raise SourceError(
        f"tokenizer_source: {reference} and {donor} have different vocabularies: "
        f"{plural(len(strange), 'token', 'tokens')} that the tokenizer of {reference} was trained with"
        f" ({first!r} first) {'is' if len(strange) == 1 else 'are'} not in {donor}, and only added tokens can be merged"
        f" by token; {ways_out}"
    )


def _places(numbers: Mapping[str, int], own: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Return the numbers in the merged vocabulary of the tokens that a model has, and its own numbers of them."""
    pairs = [(numbers[token], number) for token, number in own.items() if token in numbers]
    places = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return places[:, 0], places[:, 1]


def _filled(
    recipe: Recipe,
    numbers: Mapping[str, int],
    rows: Mapping[ModelReference, Tensor],
    every: Mapping[ModelReference, _Tokens],
    gaps: Tensor,
    sources: Sources,
) -> dict[int, Sequence[Row]]:
    """Return the rows for each number that a model lacks, or that the recipe sets; see `Vocabulary.filled`."""
    listed = recipe.tokenizer.tokens or {} if recipe.tokenizer else {}
    donor = recipe.tokenizer_donor
    lacking = torch.stack([own == NONE for own in rows.values()]).any(0)
    filled: dict[int, Sequence[Row]] = {}
    given = {numbers[token]: (token, row) for token, row in listed.items()}
    for number in sorted({*torch.nonzero(lacking).flatten().tolist(), *(n for n, (_, r) in given.items() if r.force)}):
        has = [(model, int(own[number])) for model, own in rows.items() if int(own[number]) != NONE]
        token, wanted = given.get(number, ("", None))
        if wanted and wanted.source:
            filled[number] = _given_rows(token, wanted, every, rows, sources)
        elif gaps[number]:
            filled[number] = [(donor, number)] if donor in rows else []
        elif not has:
            token = token or next(t for t, n in numbers.items() if n == number)
            raise SourceError(
                f"tokenizer.tokens: no model of the merge has the token {token!r}; give it a source:"
                " `kind: zero`, or `kind: model_token` with the model and the token whose row it gets"
                if number in given
                else f"tokenizer_source: no model of the merge has the token {token!r} of {donor}; list {donor} among"
                " the models, or name another tokenizer_source"
            )
        else:
            base = [(model, row) for model, row in has if model == recipe.base_model]
            filled[number] = base or has
    return filled


def _given_rows(
    token: str,
    wanted: TokenRow,
    every: Mapping[ModelReference, _Tokens],
    rows: Mapping[ModelReference, Tensor],
    sources: Sources,
) -> list[Row]:
    """Return the rows that a recipe's `tokens` name for one token. Raises SourceError that names the key."""
    source = wanted.source
    if isinstance(source, TokenSource) and source.kind == "zero":
        return []
    model = source.model if isinstance(source, TokenSource) else source
    named = (source.token if isinstance(source, TokenSource) else None) or token
    key = f"tokenizer.tokens: {token!r}"
    if model is None or model not in rows:
        known = ", ".join(map(str, rows))
        raise SourceError(f"{key}: its source {model} is no model of the merge; name one of {known}")
    if isinstance(source, TokenSource) and source.token_id is not None:
        if (most := min(_rows(model, sources).values(), default=0)) <= source.token_id:
            raise SourceError(f"{key}: {model} has {most} rows, none of them token_id {source.token_id}; name another")
        return [(model, source.token_id)]
    if named not in every[model].numbers:
        raise SourceError(f"{key}: its source {model} does not have the token {named!r}; name another model or token")
    return [(model, every[model].numbers[named])]


def _plain(token: str) -> Any:
    """Return a token that only a recipe names, as `tokenizer.add_tokens` of transformers makes it."""
    from tokenizers import AddedToken

    return AddedToken(token, normalized=True, special=False)


def _in_file(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor in a temporary file that has no name. Raises SourceError when the disk is full."""
    size = torch.Size(shape).numel() * dtype.itemsize
    try:
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, and not a crash later
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise SourceError(
            f"the embeddings by token need {size / 1e9:.3g} GB in the folder of temporary files,"
            f" {tempfile.gettempdir()} ({error.strerror}); make room, or set TMPDIR to another folder"
        ) from error
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def _gather(own: Tensor, rows: Tensor, table: Tensor) -> None:
    """Copy rows into the beginning of a table, some at a time; those without a number stay as they are."""
    step = max(1, CHUNK // max(1, own[:1].numel()))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        table[start : start + len(part)] = own[part.clamp(min=0)].to(table.dtype)


def _row(weight: Weight, row: int) -> Tensor:
    """Return one row of a weight; float32 where it is computed."""
    if isinstance(weight, LowRank):
        return torch.addmv(weight.origin[row].float(), weight.down.T, weight.up[row])
    return weight[row]


def _mean_row(table: Tensor) -> Tensor:
    """Return the mean of all rows, as https://nlp.stanford.edu/~johnhew/vocab-expansion.html has it."""
    total = torch.zeros(table.shape[1:], dtype=torch.float64)
    step = max(1, CHUNK // max(1, table[:1].numel()))
    for start in range(0, len(table), step):
        total += table[start : start + step].double().sum(0)
    return (total / len(table)).to(table.dtype)
