"""A model's tokenizer: its vocabulary, its chat template, and the weights with one row a token."""

import json
import re
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

from llmevo.errors import SourceError
from llmevo.models.architecture import EMBEDDINGS, HEADS, text_config
from llmevo.models.checkpoints import read_object
from llmevo.models.references import load_pretrained

VOCABULARY = re.compile(f"{EMBEDDINGS.pattern}|{HEADS.pattern}")
"""Weights with one row a token: embeddings and output heads."""

FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "tekken.json"),
    "chat_template*",
)
"""The names of a tokenizer's files, with those of its chat template."""

TEMPLATES = "additional_chat_templates"
"""The folder with a tokenizer's other chat templates, such as `tool_use.jinja`."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""The main files of tokenizers: every tokenizer has one of them."""


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of the tokenizer in a folder, and its folder of other chat templates."""
    found = {file for pattern in FILES for file in folder.glob(pattern) if file.is_file()}
    return sorted(found | {place for place in (folder / TEMPLATES,) if place.is_dir()})


def vocabulary(folder: Path) -> dict[str, int]:
    """Return every token of a model's tokenizer and its number; empty without a tokenizer. Raises SourceError."""
    tokens: dict[str, int] = {}
    whole, plain = folder / "tokenizer.json", folder / "vocab.json"
    try:
        if whole.exists():
            content = read_object(whole)
            listed = content["model"]["vocab"]
            tokens = {entry[0]: place for place, entry in enumerate(listed)} if isinstance(listed, list) else {**listed}
            tokens |= {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        elif plain.exists():
            tokens = read_object(plain)
        elif (folder / "tokenizer.model").exists():
            return dict(load_tokenizer(folder).get_vocab())
        added, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
        if added.exists():
            tokens |= read_object(added)
        if config.exists():
            decoder = read_object(config).get("added_tokens_decoder") or {}
            tokens |= {token["content"]: int(number) for number, token in decoder.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {error})") from error
    return tokens


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """Return the number of rows of the embeddings that a model's config names; 0 where it names none."""
    return int(text_config(config).get("vocab_size") or config.get("vocab_size") or 0)


def with_vocabulary_size(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return a config with another number of rows of the embeddings: that of the language model, and its own."""
    changed = deepcopy({**config})
    text = cast(dict[str, Any], text_config(changed))
    for holder in [text, changed] if "vocab_size" in changed else [text]:
        holder["vocab_size"] = rows
    return changed


def load_tokenizer(folder: Path) -> Any:
    """Return a model's tokenizer, loaded by transformers. Raises SourceError that names the damaged file."""
    from transformers import AutoConfig, AutoTokenizer  # slow to import

    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        if (folder / name).exists():
            read_object(folder / name)
    try:
        return load_pretrained(AutoTokenizer, folder)
    except SourceError as error:
        if not any((folder / name).exists() for name in TOKENIZERS):
            raise SourceError(
                f"{folder}: there is no tokenizer ({', '.join(TOKENIZERS)}); copy its files from the model that it was"
                " tuned from, or name a model that has one (genome.tokenizer_source in a config)"
            ) from error
        load_pretrained(AutoConfig, folder)  # it names the tokenizer's class, so it may be the damaged file
        raise


def same_tokenizer_file(first: Path, second: Path) -> bool:
    """Return whether two folders are one, or have the same tokenizer files: a quick check of the usual case."""
    if first == second:
        return True
    names = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json", "tokenizer.model")
    for name in names:
        one, other = first / name, second / name
        if one.exists() != other.exists() or (one.exists() and one.read_bytes() != other.read_bytes()):
            return False
    return any((first / name).exists() for name in names)


def template_of(folder: Path) -> str | None:
    """Return the chat template of a model's tokenizer, from either file that may have it."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.exists():
        try:
            return file.read_text("utf-8").strip()
        except UnicodeDecodeError as error:
            raise SourceError(f"{file} is not UTF-8 ({error}); download it again") from error
    template = read_object(config).get("chat_template") if config.exists() else None
    if isinstance(template, list):
        named = [cast(dict[str, Any], entry) for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    return template.strip() if isinstance(template, str) else None


def check_chat_template(folder: Path, tokenizer: Any, others: Mapping[str, Path]) -> None:
    """Raise SourceError unless a tokenizer, loaded from `folder`, can render a chat. `others` may have a template."""
    lenders = [name for name, other in others.items() if other != folder and template_of(other)]
    ways_out = "set apply_chat_template: false"
    if lenders:
        ways_out += f", or genome.tokenizer_source: a model that has a template ({', '.join(lenders)})"
    if tokenizer.chat_template is None:
        raise SourceError(f"{folder}: apply_chat_template is true, and there is no chat template; {ways_out}")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: jinja2 raises whatever its expressions raise
        raise SourceError(
            f"{folder}: apply_chat_template is true, and the chat template cannot be rendered ({type(error).__name__}:"
            f" {str(error).partition(chr(10))[0]}); correct the template, or {ways_out}"
        ) from error


def set_chat_template(folder: Path, template: str) -> None:
    """Give a tokenizer another chat template, its only one, in the file that transformers reads first."""
    for file in [*folder.glob("chat_template*"), *folder.glob(TEMPLATES)]:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    (folder / "chat_template.jinja").write_text(template)
    config = folder / "tokenizer_config.json"
    if config.exists():
        content = read_object(config)
        content.pop("chat_template", None)
        config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
