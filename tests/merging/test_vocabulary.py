"""Whose tokenizer a merged model gets, and when the models' tokens are compared."""

import json
from pathlib import Path
from typing import Any

import yaml

from llmevo.models.checkpoints import read_object
from llmevo.models.tokenizer import template_of
from support.workspace import Workspace

SEARCH = {"search": {"optimizer": "random", "budget": 4}, "heldout": None}


def config(workspace: Workspace, source: str) -> Path:
    genome = {
        "base_model": "base",
        "models": ["one", "two"],
        "merge_method": "task_arithmetic",
        "dtype": "float32",
        "tokenizer_source": source,
    }
    return workspace.config(genome=genome, **SEARCH)


def recipe(workspace: Workspace, **keys: Any) -> Path:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("one", "two")]
    file = workspace.root / "recipe.yml"
    file.write_text(yaml.safe_dump({"merge_method": "linear", "models": models, **keys}))
    return file


def exchange(file: Path) -> None:
    """Give two tokens each other's number."""
    content = json.loads(file.read_text())
    tokens = content["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    file.write_text(json.dumps(content))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_union_of_equal_vocabularies_is_the_base_models(workspace: Workspace) -> None:
    recipes: list[Any] = []
    for source in ("base", "union"):
        status, printed = workspace.llmevo("run", config(workspace, source), "--out", f"by-{source}")
        assert status == 0, printed
        recipes.append([*workspace.state(f"by-{source}").recipes.values()])
    assert recipes[0] == recipes[1]
    status, printed = workspace.llmevo("export", "by-union", "out")
    assert status == 0, printed
    base, out = (workspace.root / name / "tokenizer.json" for name in ("base", "out"))
    assert out.read_text() == base.read_text()


def test_only_without_a_tokenizer_source_do_other_numbers_of_a_token_matter(workspace: Workspace) -> None:
    exchange(workspace.root / "two" / "tokenizer.json")
    for source, differ in (("base", True), ("union", False), ("one", False)):
        status, printed = workspace.llmevo("inspect", config(workspace, source))
        assert status == 0, printed
        assert ("2 tokens differ from those of base" in printed) == differ


def test_a_tokenizer_source_without_a_tokenizer_is_refused(workspace: Workspace) -> None:
    for file in (workspace.root / "one").glob("*token*"):
        file.unlink()
    for words in (("inspect", config(workspace, "one")), ("merge", recipe(workspace, tokenizer_source="one"), "out")):
        status, printed = workspace.llmevo(*words)
        assert status == 2
        assert "tokenizer_source: one has no tokenizer" in printed


def test_a_tokenizer_source_that_is_no_reference_is_refused_by_the_config(workspace: Workspace) -> None:
    status, printed = workspace.llmevo("inspect", config(workspace, "one+"))
    assert status == 2
    assert "genome.tokenizer_source: 'one+' is not a model reference; write base, union or a model" in printed


def test_a_model_in_a_place_that_cannot_be_written_is_refused(workspace: Workspace) -> None:
    (workspace.root / "file").write_text("")
    status, printed = workspace.llmevo("merge", recipe(workspace), "file/out")
    assert (status, "file/out cannot be written" in printed) == (2, True)


def test_a_list_of_chat_templates_without_names_is_none(workspace: Workspace) -> None:
    (workspace.root / "one" / "chat_template.jinja").unlink(missing_ok=True)
    file = workspace.root / "one" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": [{"template": "x"}]}))
    assert template_of(workspace.root / "one") is None


def test_a_damaged_tokenizer_is_found_before_the_weights_are_merged(workspace: Workspace) -> None:
    file = workspace.root / "one" / "tokenizer_config.json"
    file.write_text("{")
    workspace.monkeypatch.setattr("llmevo.merging.writer.write_weights", None)
    status, printed = workspace.llmevo("merge", recipe(workspace), "out")
    assert (status, f"{file} is not valid JSON" in printed) == (2, True), printed
    file.write_text("{}")
    (workspace.root / "one" / "chat_template.jinja").write_bytes(b"\xff")
    status, printed = workspace.llmevo("merge", recipe(workspace, chat_template="auto"), "out")
    assert (status, "chat_template.jinja is not UTF-8" in printed) == (2, True), printed


def test_one_model_under_two_spellings_is_refused_in_one_line(workspace: Workspace) -> None:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("one", "./one")]
    status, printed = workspace.llmevo("merge", recipe(workspace, models=models), "out")
    assert status == 2, printed
    assert "one is listed twice" in printed
    assert "write each model's path in the same way" in printed


def test_a_cache_folder_that_cannot_be_written_is_named(workspace: Workspace) -> None:
    (workspace.root / "texts.json").write_text(json.dumps({"letters": ["a b"]}))
    workspace.monkeypatch.setenv("LLMEVO_HOME", "/dev/null/x")
    prepare = {"steps": ["aim"], "text": "texts.json"}
    file = recipe(workspace, merge_method="task_arithmetic", base_model="base", prepare=prepare)
    status, printed = workspace.llmevo("merge", file, "out")
    assert status == 2, printed
    assert "cannot be written (Not a directory); make room in the cache folder, or set LLMEVO_HOME" in printed


def test_a_merge_without_a_tokenizer_says_so(workspace: Workspace) -> None:
    status, printed = workspace.llmevo("merge", recipe(workspace), "with")
    assert (status, "no tokenizer" in printed) == (0, False)
    for file in (workspace.root / "one").glob("*token*"):
        file.unlink()
    status, printed = workspace.llmevo("merge", recipe(workspace), "without")
    assert status == 0
    assert "It has no tokenizer, as one has none" in printed


def test_a_merge_names_the_filters_that_match_no_tensor_of_any_slice(workspace: Workspace) -> None:
    def source(model: str, layers: tuple[int, int], *filters: str) -> dict[str, object]:
        weights = [*({"filter": name, "value": 0.9} for name in filters), {"value": 0.5}]
        return {"model": model, "layer_range": [*layers], "parameters": {"weight": weights}}

    slices = [
        {"sources": [source("one", (0, 1), "embed", "mpl"), source("two", (0, 1), "embed")]},
        {"sources": [source("one", (1, 2), "embed", "mlp"), source("two", (1, 2), "mpl")]},
    ]
    stacked = {"merge_method": "linear", "slices": slices, "dtype": "bfloat16"}
    (workspace.root / "stacked.yml").write_text(json.dumps(stacked))
    status, printed = workspace.llmevo("merge", "stacked.yml", "stacked")
    assert status == 0, printed
    assert " ".join(printed.split()).count("weight: filter") == 1
    assert "These filters match no tensor, so their values are not used: weight: filter 'mpl'." in (
        " ".join(printed.split())
    )
    status, printed = workspace.llmevo("merge", recipe(workspace), "plain")
    assert (status, "match no tensor" in printed) == (0, False)


def test_with_equal_tokens_the_special_ones_are_those_of_the_named_model(workspace: Workspace) -> None:
    change(workspace.root / "base" / "config.json", pad_token_id=0)
    for name in ("config.json", "generation_config.json"):
        change(workspace.root / "two" / name, eos_token_id=[3, 5], pad_token_id=None)
    for source, ends in (("two", [3, 5]), ("base", 3)):
        file = recipe(workspace, base_model="base", merge_method="task_arithmetic", tokenizer_source=source)
        status, printed = workspace.llmevo("merge", file, f"as-{source}")
        assert status == 0, printed
        for name in ("config.json", "generation_config.json"):
            assert read_object(workspace.root / f"as-{source}" / name)["eos_token_id"] == ends
        assert read_object(workspace.root / f"as-{source}" / "config.json")["pad_token_id"] == (
            None if source == "two" else 0
        )
