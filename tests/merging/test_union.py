"""Models whose tokens differ: merged by token, as mergekit merges them, with a tokenizer that has all tokens."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmevo.errors import SourceError
from llmevo.export.merge import merge
from llmevo.merging.recipe import Recipe
from support.checkpoints import assert_same_bits, weights_of
from support.parity import LIMIT, distance, theirs
from support.tiny_model import tiny_llama, tiny_tokenizer
from support.workspace import Workspace

SPECIAL = ("<|im_start|>", "<|im_end|>", "<th>")
START, END, THINK = (AddedToken(text, special=True, normalized=False) for text in SPECIAL)
TOKENS = {"base": (), "one": (START, END), "two": (THINK, END, AddedToken("hello", normalized=True))}
BASE = len(tiny_tokenizer())
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save(folder: Path, seed: int, added: Sequence[AddedToken] = (), padding: int = 0, **changes: Any) -> Path:
    """A model with added tokens, each with a row of its own, and rows that no token has."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([*added])
    tiny_llama(seed, vocab_size=len(tokenizer) + padding, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def new_models(root: Path, **changes: Any) -> Path:
    for seed, (name, added) in enumerate(TOKENS.items()):
        save(root / name, seed, added, padding=4 * (name == "base"), **changes)
    return root


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_models(tmp_path_factory.mktemp("union"))


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "models")
    return tmp_path / "models"


def recipe_of(method: str = "task_arithmetic", names: Sequence[str] = ("one", "two"), **keys: Any) -> dict[str, Any]:
    base = {} if method in ("linear", "karcher") else {"base_model": "base"}
    weights = {"one": 0.3, "two": 0.9, "base": 0.5}
    models = [{"model": name, "parameters": {"weight": weights[name]}} for name in names]
    if method == "ties":
        models = [{**model, "parameters": {**model["parameters"], "density": 0.5}} for model in models]
    return {"merge_method": method, **base, "models": models, "dtype": "float32", "tokenizer_source": "union", **keys}


def merged(recipe: Mapping[str, Any], root: Path, out: Path) -> dict[str, Tensor]:
    merge(Recipe.from_yaml(yaml.safe_dump(dict(recipe))), out, root=root)
    return weights_of(out)


def assert_as_mergekit(recipe: Mapping[str, Any], root: Path, out: Path) -> dict[str, Tensor]:
    """Fail unless every token has mergekit's row. mergekit numbers added tokens in the order of a set of models."""
    mine, wanted = merged(recipe, root, out / "ours"), theirs(recipe, root, out / "theirs")
    loaded = [AutoTokenizer.from_pretrained(out / who) for who in ("ours", "theirs")]
    here, there = (tokenizer.get_vocab() for tokenizer in loaded)
    assert here.keys() == there.keys()
    places = torch.arange(len(mine[EMBEDDINGS]))
    places[[*here.values()]] = torch.tensor([there[token] for token in here])
    wanted = {name: tensor[places] if name in (EMBEDDINGS, HEAD) else tensor for name, tensor in wanted.items()}
    assert distance(mine, wanted) <= LIMIT
    text = "a<|im_start|>hello <th>b<|im_end|>"
    assert loaded[0].tokenize(text) == loaded[1].tokenize(text)
    flags = [{token.content: token for token in each.added_tokens_decoder.values()} for each in loaded]
    assert flags[0] == flags[1]
    sizes = [json.loads((out / who / "config.json").read_text())["vocab_size"] for who in ("ours", "theirs")]
    assert sizes[0] == sizes[1] == len(mine[EMBEDDINGS])
    return mine


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear"])
def test_a_union_is_mergekits_row_by_row(method: str, root: Path, tmp_path: Path) -> None:
    recipe = recipe_of(method, ("base", "one", "two") if method == "linear" else ("one", "two"))
    mine = assert_as_mergekit(recipe, root, tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path / "ours").get_vocab()
    assert [found[token] for token in ("<|im_start|>", "<|im_end|>", "<th>", "hello")] == [*range(BASE, BASE + 4)]
    for name in (EMBEDDINGS, HEAD):
        one, two = (weights_of(root / of)[name] for of in ("one", "two"))
        torch.testing.assert_close(mine[name][found["<|im_start|>"]], one[BASE])  # in one model only: as it is there
        torch.testing.assert_close(mine[name][found["<th>"]], two[BASE])
        assert not torch.equal(mine[name][found["<|im_end|>"]], one[BASE + 1])


@pytest.mark.parametrize("source", ["base", "one"])
def test_another_source_is_mergekits_too(source: str, root: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tokenizer_source=source)
    mine = merged(recipe, root, tmp_path / "ours")
    placed = {**recipe, "tokenizer_source": source if source == "base" else str(root / source)}
    assert distance(mine, theirs(placed, root, tmp_path / "theirs")) <= LIMIT
    assert len(mine[EMBEDDINGS]) == BASE + (2 if source == "one" else 0)


def test_tied_heads_and_padding_are_mergekits(tmp_path: Path) -> None:
    root = new_models(tmp_path / "models", tied=True)
    recipe = {**recipe_of(), "tokenizer": {"source": "union", "pad_to_multiple_of": 32}}
    del recipe["tokenizer_source"]
    mine = assert_as_mergekit(recipe, root, tmp_path)
    assert HEAD not in mine
    assert len(mine[EMBEDDINGS]) == 128
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded.lm_head.weight, mine[EMBEDDINGS])


@pytest.mark.parametrize("order", [("base", "one", "two"), ("two", "one")])
def test_a_merge_without_a_base_takes_the_mean_for_the_others(order: Sequence[str], tmp_path: Path) -> None:
    root = new_models(tmp_path / "models")
    save(root / "base", 5, (AddedToken("hello", normalized=True),))  # in base and two, at other numbers
    assert_as_mergekit(recipe_of("linear", order), root, tmp_path)


def test_the_rows_of_single_tokens_are_mergekits(root: Path, tmp_path: Path) -> None:
    tokens = {
        "<|im_start|>": {"source": str(root / "one"), "force": True},
        "a": {"source": {"kind": "model_token", "model": str(root / "two"), "token": "b"}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": str(root / "one"), "token_id": 7}},
        "<zero>": {"source": {"kind": "zero"}},
        "hello": {"source": {"kind": "model_token", "model": str(root / "one"), "token": "h"}},
    }
    recipe = recipe_of(base_model=str(root / "base"))
    recipe["models"] = [{**model, "model": str(root / model["model"])} for model in recipe["models"]]
    del recipe["tokenizer_source"]
    mine = assert_as_mergekit({**recipe, "tokenizer": {"source": "union", "tokens": tokens}}, root, tmp_path)
    assert not mine[EMBEDDINGS][BASE + 5].any()


def test_tokens_of_equal_number_but_other_text_are_moved(root: Path, tmp_path: Path) -> None:
    file = root / "one" / "tokenizer.json"
    content = json.loads(file.read_text())
    tokens = content["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    file.write_text(json.dumps(content))
    assert_as_mergekit(recipe_of("linear", ("base", "one")), root, tmp_path)


def test_rows_without_a_token_are_cut_off_whatever_their_number(tmp_path: Path) -> None:
    save(tmp_path / "base", 0, padding=28)
    save(tmp_path / "one", 1, padding=4)
    mine = merged(recipe_of("linear", ("base", "one")), tmp_path, tmp_path / "out")
    assert len(mine[EMBEDDINGS]) == len(mine[HEAD]) == BASE
    with pytest.raises(SourceError, match="give `tokenizer_source: union`"):
        merged(recipe_of("linear", ("base", "one"), tokenizer_source=None), tmp_path, tmp_path / "other")


# --- searches ---------------------------------------------------------------------------------------------------


def search_of(workspace: Workspace, source: str = "union", method: str = "task_arithmetic", **keys: Any) -> Path:
    """A config over a base and two models whose tokens differ."""
    for name in TOKENS:
        shutil.rmtree(workspace.root / name)
    new_models(workspace.root)
    genome = {
        "base_model": "base",
        "models": ["one", "two"],
        "merge_method": method,
        "dtype": "float32",
        "tokenizer_source": source,
        **keys.pop("genome", {}),
    }
    return workspace.config(genome=genome, **{"search": {"optimizer": "random", "budget": 6}, **keys})


def test_a_search_scores_and_exports_the_union(workspace: Workspace) -> None:
    status, printed = workspace.llmevo("inspect", search_of(workspace))
    assert status == 0, printed
    assert "tokens differ" not in printed
    status, printed = workspace.llmevo("run", "config.yml", "--out", "run")
    assert status == 0, printed
    state = workspace.state("run")
    assert state.started
    assert len(state.started.vocabulary) == 64
    assert all(recipe["tokenizer_source"] == "union" for recipe in state.recipes.values())
    assert {trial.candidate.origin for trial in state.trials.values() if trial.score} >= {"parent", "uniform", "random"}
    for words in (("replay", "run", "--verify"), ("export", "run", "out"), ("merge", "run/best.yml", "again")):
        status, printed = workspace.llmevo(*words)
        assert status == 0, printed
    assert_same_bits(weights_of(workspace.root / "out"), weights_of(workspace.root / "again"))
    assert len(weights_of(workspace.root / "out")[EMBEDDINGS]) == BASE + 4
    left = [place for place in Path(tempfile.gettempdir()).iterdir() if "llmevo-engine" in place.name]
    assert not left
