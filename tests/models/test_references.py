"""What a model reference means, and what is said when it means nothing."""

from pathlib import Path

import huggingface_hub.constants
import pytest
from pydantic import ValidationError

from llmevo.errors import SourceError
from llmevo.merging.recipe import Recipe
from llmevo.models.files import cache_folder, partial_folder, rename_once
from llmevo.models.references import ModelPath, ModelReference, folder_of


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, and a hub cache with nothing in it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "model", "revision", "lora", "lora_revision"),
    [
        ("owner/name", "owner/name", None, None, None),
        ("owner/name@abc123", "owner/name", "abc123", None, None),
        ("owner/name+me/adapter", "owner/name", None, "me/adapter", None),
        ("owner/name@v1+me/adapter@v2", "owner/name", "v1", "me/adapter", "v2"),
        ("./here/model+./here/lora", "./here/model", None, "./here/lora", None),
        ("package:some_package/model", "package:some_package/model", None, None, None),
        ("owner/name/file.gguf@main", "owner/name/file.gguf", "main", None, None),
    ],
)
def test_every_form_is_read_into_its_parts_and_written_back_the_same(
    text: str, model: str, revision: str | None, lora: str | None, lora_revision: str | None
) -> None:
    reference = ModelReference.parse(text)
    assert reference.model == ModelPath(path=model, revision=revision)
    assert reference.lora == (ModelPath(path=lora, revision=lora_revision) if lora else None)
    assert str(reference) == text
    assert reference.model_dump(mode="json") == text
    assert ModelReference.parse(str(reference)) == reference


@pytest.mark.parametrize("text", ["", "+adapter", "model+", "model+one+two", "@main", "model+@main"])
def test_a_reference_with_a_missing_part_is_refused_with_the_form_to_write(text: str) -> None:
    with pytest.raises(ValidationError, match="is not a model reference; write MODEL"):
        ModelReference.parse(text)


def test_the_long_form_of_mergekit_is_the_same_reference() -> None:
    long = ModelReference.model_validate({"model": {"path": "a/b", "revision": "c"}, "lora": {"path": "d/e"}})
    assert long == ModelReference.parse("a/b@c+d/e")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("owner/name@v1", "name"),
        ("folder/model/", "model"),
        ("owner/name+me/adapter", "adapter"),
        ("owner/name/small-Q4.gguf", "small-Q4"),
        ("package:some_package/experts/math", "math"),
    ],
)
def test_a_model_is_called_by_the_last_part_of_its_path(text: str, name: str) -> None:
    assert ModelReference.parse(text).name == name


def test_references_to_the_same_model_are_one_key() -> None:
    one, again = (ModelReference.parse("a/b@c+d/e") for _ in range(2))
    assert (one, hash(one)) == (again, hash(again))
    assert ModelReference.parse("a/b@c") != ModelReference.parse("a/b")


def test_a_relative_folder_starts_at_the_root(tmp_path: Path) -> None:
    (tmp_path / "models" / "one").mkdir(parents=True)
    assert folder_of(ModelPath(path="models/one"), tmp_path) == tmp_path / "models" / "one"


def test_an_absolute_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    assert folder_of(ModelPath(path=str(folder)), tmp_path / "elsewhere") == folder


def test_a_file_of_a_package_is_found_where_the_package_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "carries_models" / "small").mkdir(parents=True)
    (tmp_path / "carries_models" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert folder_of(ModelPath(path="package:carries_models/small")) == tmp_path / "carries_models" / "small"


@pytest.mark.parametrize(
    "path", ["package:no_such_package/x", "package:no_such.inner/x", "package:json/no-such-file", "package:/x"]
)
def test_a_package_that_lacks_the_file_or_is_missing_is_named(path: str) -> None:
    with pytest.raises(SourceError, match=r"no Python package .* with a file .* is installed here") as caught:
        folder_of(ModelPath(path=path))
    assert path in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_a_hub_id_that_cannot_be_fetched_says_both_places_that_were_tried(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="neither a local folder nor available from the Hugging Face hub") as caught:
        folder_of(ModelPath(path="owner/no-such-model", revision="v9"), tmp_path)
    assert "owner/no-such-model@v9" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_a_gguf_file_of_the_hub_that_cannot_be_fetched_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"owner/name/file\.gguf: neither a local folder"):
        folder_of(ModelPath(path="owner/name/file.gguf"), tmp_path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("path", ["./missing/model", "/no/such/folder", "just-a-name", "far/too/many/parts"])
def test_a_missing_folder_is_not_mistaken_for_a_hub_id(path: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"there is no such folder .* does not look like a hub id \(owner/name\)"):
        folder_of(ModelPath(path=path), tmp_path)


@pytest.mark.usefixtures("offline")
def test_of_a_path_whose_first_folder_is_here_it_is_said_that_it_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(SourceError, match=rf"models/nope: {tmp_path}/models/nope does not exist"):
        folder_of(ModelPath(path="models/nope"), tmp_path)


def test_a_file_that_is_no_gguf_file_is_refused_with_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(SourceError, match=r"is a file; give the folder of a model, or a \.gguf file"):
        folder_of(ModelPath(path="weights.bin"), tmp_path)


def test_converted_models_are_kept_in_the_folder_of_llmevo_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMEVO_HOME", raising=False)
    assert cache_folder() == tmp_path / "cache" / "llmevo"
    monkeypatch.setenv("LLMEVO_HOME", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_of_two_processes_that_make_one_folder_the_slower_one_takes_the_fasters(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with partial_folder(out) as slower:
        (slower / "file").write_text("slower")
        out.mkdir()
        (out / "file").write_text("faster")
        rename_once(slower, out)
    assert (out / "file").read_text() == "faster"
    assert [place.name for place in tmp_path.iterdir()] == ["out"]
    with partial_folder(out) as partial, pytest.raises(FileNotFoundError):
        rename_once(partial, tmp_path / "missing" / "out")


def test_a_stop_while_a_recipe_is_written_is_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_: ModelReference) -> str:
        raise KeyboardInterrupt

    recipe = Recipe.of_one(ModelReference.parse("one"))
    monkeypatch.setattr(ModelReference, "__str__", stopped)
    with pytest.raises(KeyboardInterrupt):
        recipe.as_dict()
