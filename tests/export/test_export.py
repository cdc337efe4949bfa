"""An exported model is the scored model, and a normal Hugging Face folder."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmevo.engines.hf import HfEngine
from llmevo.errors import CandidateError, RecipeError, SourceError, UserError
from llmevo.evaluation.evaluator import Evaluator
from llmevo.export.merge import merge
from llmevo.merging import writer as writing
from llmevo.merging.provenance import Provenance
from llmevo.merging.recipe import Recipe
from llmevo.models import safetensors_writer as shards
from llmevo.models.files import partial_folder
from llmevo.models.sources import Sources
from llmevo.models.tokenizer import vocabulary
from llmevo.run.experiment import Experiment
from support.memory import printed_by
from support.tiny_model import tiny_llama, tiny_tokenizer
from support.workspace import Workspace

STACKED = """
merge_method: linear
slices:
  - sources: [{model: one, layer_range: [0, 2], parameters: {weight: 1.0}}]
  - sources: [{model: two, layer_range: [1, 2], parameters: {weight: 1.0}}]
"""


@pytest.fixture
def finished(workspace: Workspace) -> Workspace:
    """A workspace with a finished run in `run`."""
    workspace.finished()
    return workspace


def test_the_exported_model_has_the_held_out_score_that_the_run_reported(finished: Workspace) -> None:
    status, printed = finished.llmevo("export", "run", "out")
    assert status == 0, printed
    state = finished.state("run")
    experiment = Experiment.of_log(state.started, Path("run"))
    engine = HfEngine(Path("out"), Path("out"), "float32")
    assert experiment.heldout is not None
    assert experiment.heldout.score(engine.lm).total == state.heldout["best"].score
    assert experiment.evaluator.score(engine.lm).total == (state.best.value if state.best else None)


def test_the_folder_has_everything_a_hugging_face_model_has(finished: Workspace) -> None:
    finished.llmevo("export", "run", "out")
    names = {file.name for file in Path("out").iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "best.yml",
        "mergekit_config.yml",
        "README.md",
    }
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained("out").encode("abc")


def test_the_card_names_parents_scores_and_recipe(finished: Workspace) -> None:
    finished.llmevo("export", "run", "out")
    card = Path("out/README.md").read_text()
    state = finished.state("run")
    assert "| `one` |" in card
    assert "merge_method: task_arithmetic" in card
    assert f"{state.heldout['best'].score:.3f}" in card
    assert str(finished.root) not in card


def test_the_card_of_another_than_the_best_does_not_pass_off_the_bests_scores(finished: Workspace) -> None:
    state = finished.state("run")
    held = {row.candidate for row in state.heldout.values()}
    other = next(number for number in state.trials if number not in held)
    assert finished.llmevo("export", "run", "out", "--candidate", other, "--recipe-only")[0] == 0
    note = f"This model was not asked them; `best` is candidate {state.heldout['best'].candidate}."
    assert note in Path("out/README.md").read_text()
    assert finished.llmevo("export", "run", "best", "--recipe-only")[0] == 0
    assert "`best` is candidate" not in Path("best/README.md").read_text()


def test_the_card_of_a_failure_says_why_it_has_no_score(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    real, scored = Evaluator.score, list[int]()

    def failing(self: Evaluator, *words: Any) -> Any:
        scored.append(1)
        if len(scored) == 2:
            raise CandidateError("it is no good")
        return real(self, *words)

    monkeypatch.setattr(Evaluator, "score", failing)
    search = {"optimizer": "random", "budget": 4, "seed": 3, "racing": False}
    assert workspace.llmevo("run", workspace.config(heldout=None, search=search), "--out", "run")[0] == 0
    assert workspace.llmevo("export", "run", "out", "--candidate", 1, "--recipe-only")[0] == 0
    card = Path("out/README.md").read_text()
    assert "It has no score because it failed: it is no good." in card
    assert "inf" not in card


def test_the_recipes_in_an_exported_folder_give_the_same_weights(finished: Workspace) -> None:
    finished.llmevo("export", "run", "models/out")
    for name in ("best.yml", "mergekit_config.yml"):
        status, printed = finished.llmevo("merge", f"models/out/{name}", f"again-{name}")
        assert status == 0, printed
        same = Path("models/out/model.safetensors").read_bytes()
        assert Path(f"again-{name}/model.safetensors").read_bytes() == same
    assert finished.llmevo("merge", "again-best.yml/mergekit_config.yml", "third")[0] == 0


def test_any_candidate_can_be_exported_and_an_unknown_one_is_named(finished: Workspace) -> None:
    assert finished.llmevo("export", "run", "parent", "--candidate", "2")[0] == 0
    one, parent = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("one", "parent"))
    assert all(torch.equal(one[name], parent[name]) for name in one)
    status, printed = finished.llmevo("export", "run", "other", "--candidate", "99")
    assert status == 2
    assert "0 to 8" in printed
    assert not Path("other").exists()


def _foreign_model(event: dict[str, Any]) -> None:
    if event["event"] == "asked":
        for candidate in event["candidates"]:
            text = json.dumps(candidate["recipe"]).replace('"model": "one"', '"model": "stranger/model"')
            candidate["recipe"] = json.loads(text)


def _unknown_method(event: dict[str, Any]) -> None:
    if event["event"] == "asked":
        for candidate in event["candidates"]:
            candidate["recipe"]["merge_method"] = "magic"


def _no_recipe(event: dict[str, Any]) -> None:
    if event["event"] == "asked":
        del event["candidates"][0]["recipe"]


def _other_metric(event: dict[str, Any]) -> None:
    if event["event"] == "heldout":
        event["tasks"] = {task: {"other,none": 0.5} for task in event["tasks"]}


def test_an_edited_log_is_one_clear_error_that_names_it(finished: Workspace) -> None:
    log = Path("run/events.jsonl")
    original = log.read_text()
    for edit, says in (
        (_foreign_model, "names stranger/model, which is not a model of the run"),
        (_unknown_method, "'magic' is unknown"),
        (_no_recipe, "KeyError: 'recipe'"),
        (_other_metric, "KeyError: 'acc,none'"),
    ):
        events = [json.loads(line) for line in original.splitlines()]
        for event in events:
            edit(event)
        log.write_text("".join(json.dumps(event) + "\n" for event in events))
        status, printed = finished.llmevo("export", "run", "out", "--recipe-only")
        assert (status, says in printed, "changed by hand" in printed) == (2, True, True), printed
        assert printed.startswith("Error: run"), printed
        status, printed = finished.llmevo("replay", "run", "--verify")
        assert (status, "does not follow from its config: line" in printed) == (2, True), printed
        status, printed = finished.llmevo("replay", "run")  # shows what it can
        assert status == 0 or "changed by hand" in printed
        assert not Path("out").exists()


def test_a_log_whose_best_was_not_held_out_is_exported(finished: Workspace) -> None:
    log = Path("run/events.jsonl")
    lines = [line for line in log.read_text().splitlines(keepends=True) if json.loads(line).get("row") != "best"]
    log.write_text("".join(lines))
    assert finished.llmevo("export", "run", "out", "--recipe-only")[0] == 0
    assert "## Held-out score" in Path("out/README.md").read_text()


def test_another_model_at_the_same_place_is_not_exported_under_the_scores_of_the_first(finished: Workspace) -> None:
    two = finished.root / "two" / "model.safetensors"
    weights = load_file(two)
    save_file({name: weight * 1.5 for name, weight in weights.items()}, two, {"format": "pt"})
    status, printed = finished.llmevo("export", "run", "out")
    assert (status, "sources.two.checksum" in printed, "--force" in printed) == (2, True, True), printed
    assert not Path("out").exists()
    assert finished.llmevo("export", "run", "recipe", "--recipe-only")[0] == 0  # it needs no weights
    status, printed = finished.llmevo("export", "run", "out", "--force")
    assert status == 0, printed
    card = Path("out/README.md").read_text()
    assert "These are not the weights that were scored:** `two` had changed" in card
    assert "bit for bit" not in card + Path("out/best.yml").read_text()
    assert "model-index" not in card


def test_a_config_that_computes_something_else_since_the_run_is_noticed(finished: Workspace) -> None:
    file = finished.root / "two" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "use_cache": False, "transformers_version": "9"}))
    assert finished.llmevo("export", "run", "out")[0] == 0
    file.write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    status, printed = finished.llmevo("export", "run", "again")
    assert (status, "sources.two.config" in printed, "--force" in printed) == (2, True, True), printed


def test_a_folder_that_holds_something_is_not_overwritten(finished: Workspace) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    status, printed = finished.llmevo("export", "run", "out")
    assert status == 2
    assert "exists already" in printed
    assert [file.name for file in Path("out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("out", ["file/out", "file/deep/out", "/proc/out"])
def test_a_place_that_cannot_be_written_is_one_clear_error(finished: Workspace, out: str) -> None:
    Path("file").write_text("")
    for words in ((), ("--recipe-only",)):
        status, printed = finished.llmevo("export", "run", out, *words)
        assert (status, f"{out} cannot be written" in printed) == (2, True), printed


def test_a_merge_behind_a_link_lies_there_and_its_recipe_names_the_models_from_there(workspace: Workspace) -> None:
    for folder in ("disk/deep/real", "disk/one"):  # `../one` behind the link, which is another folder than before it
        Path(folder).mkdir(parents=True)
    for link, to in (("runs", "disk/deep"), ("link", "disk/deep/real"), ("dangling", "disk/deep/new")):
        Path(link).symlink_to(to)
    recipe = Recipe.from_yaml("merge_method: linear\nmodels: [{model: one, parameters: {weight: 1.0}}]")
    for out in ("runs/out", "link", "dangling"):
        merge(recipe, out)
        assert load_file(f"{out}/model.safetensors").keys() == load_file("one/model.safetensors").keys()
        merge(Path(out, "mergekit_config.yml"), f"again-{Path(out).name}")
    workspace.monkeypatch.chdir("disk")
    Path("here").mkdir()
    workspace.monkeypatch.chdir("here")
    merge(recipe, ".", root=workspace.root)
    assert Path("../here/config.json").exists()


def test_nothing_of_the_place_of_a_model_stays_in_a_merge(workspace: Workspace) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        file = workspace.root / "one" / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**content, "auto_map": {"AutoConfig": "own.Config"}, "_name_or_path": "/home/me"}))
    recipe = "merge_method: linear\nmodels: [{model: one, parameters: {weight: 1.0}}]"
    merge(Recipe.from_yaml(recipe), "out")
    for name in ("config.json", "tokenizer_config.json"):
        assert not {"auto_map", "_name_or_path"} & json.loads(Path("out", name).read_text()).keys()
    (workspace.root / "one" / "tokenizer_config.json").write_text("{broken")
    with pytest.raises(SourceError, match=r"tokenizer_config.json is not valid JSON"):
        merge(Recipe.from_yaml(recipe), "again")
    assert not Path("again").exists()


def test_a_merge_of_a_kind_that_transformers_does_not_know_says_which_code_it_needs(workspace: Workspace) -> None:
    file = workspace.root / "one" / "config.json"
    code = {"AutoConfig": "configuration_my.MyConfig", "AutoModelForCausalLM": "org/code--modeling_my.MyModel"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "my", "auto_map": code}))
    recipe = "merge_method: linear\nmodels: [{model: one, parameters: {weight: 1}}]"
    (workspace.root / "recipe.yml").write_text(recipe)
    status, printed = workspace.llmevo("merge", "recipe.yml", "merged")
    assert status == 0
    assert "copy configuration_my.py, modeling_my.py and the key auto_map of config.json from one" in printed
    assert "from_pretrained" not in printed


@pytest.mark.usefixtures("workspace")
def test_a_merge_of_a_signed_recipe_is_signed_too() -> None:
    tiny_llama(vocab_size=104).save_pretrained("padded")
    tiny_tokenizer().save_pretrained("padded")
    text = "merge_method: linear\nmodels: [{model: padded, parameters: {weight: 1}}]\ntokenizer_source: padded\n"
    Path("best.yml").write_text(Provenance(3).sign(Recipe.from_yaml(text)))
    merge("best.yml", "first")
    merge("first/mergekit_config.yml", "second")
    rows = [
        load_file(f"{name}/model.safetensors")["model.embed_tokens.weight"].shape[0] for name in ("first", "second")
    ]
    assert rows == [104, 104]  # a scored model has the rows beyond the last token


@pytest.mark.usefixtures("workspace")
def test_a_chat_template_of_a_recipe_is_in_every_format() -> None:
    text = "{{ messages[0].content }} and more"
    recipe = Recipe.from_yaml(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: one, parameters: {weight: 0.5}}]"
    )
    recipe = recipe.model_copy(update={"chat_template": text})
    for out, as_ in (("whole", None), ("adapter", "lora")):
        merge(recipe, out, as_=as_)
        assert Path(out, "chat_template.jinja").read_text() == text
    with pytest.raises(UserError, match=r"out.gguf: it would be a folder; add --as gguf:q8_0"):
        merge(recipe, "out.gguf")


@pytest.mark.usefixtures("finished")
def test_prepared_experts_are_not_pushed(finished: Workspace) -> None:
    status, printed = finished.llmevo("export", "run", "out", "--as", "experts", "--push", "me/x")
    assert (status, "prepared experts are for mergekit on this machine" in printed) == (2, True), printed


def test_a_full_disk_leaves_nothing_that_looks_whole(workspace: Workspace) -> None:
    recipe = Recipe.from_yaml(STACKED)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may be larger than this: the operating system's own refusal, in the middle of the weights.
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(UserError, match=r"out cannot be written \(.*File too large"):
            writing.write_model(recipe, Sources(workspace.root), Path("out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in workspace.root.iterdir() if "out" in path.name]


def test_a_merge_that_fails_midway_leaves_nothing(workspace: Workspace) -> None:
    recipe = Recipe.from_yaml(
        "merge_method: linear\nmodels: [{model: one, parameters: {weight: 1e30}}]\ndtype: float16"
    )
    with pytest.raises(CandidateError):
        writing.write_model(
            recipe.model_copy(update={"parameters": {"normalize": False}}), Sources(workspace.root), Path("out")
        )
    assert not [path for path in workspace.root.iterdir() if "out" in path.name]


def test_a_parameter_that_only_the_last_weight_lacks_is_missed_before_anything_is_written(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "merge_method: linear\nmodels: [{model: one, parameters: {weight: [{filter: layers, value: 1}]}}]"
    monkeypatch.setattr(writing, "merge", lambda *_: pytest.fail("the merge began"))
    with pytest.raises(RecipeError, match="the parameter 'weight' is missing for the tensor"):
        writing.write_model(Recipe.from_yaml(text), Sources(workspace.root), Path("out"))


WORKER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from llmevo.merging import writer as writing
from llmevo.merging.recipe import Recipe
from llmevo.models.sources import Sources

merge = writing.merge
def dies(*arguments):
    for place, item in enumerate(merge(*arguments)):
        if place == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item
writing.merge = dies
writing.write_model(Recipe.from_yaml(Path("stacked.yml").read_text()), Sources(), Path("out"))
"""


def test_a_killed_worker_leaves_no_model(workspace: Workspace) -> None:
    Path("stacked.yml").write_text(STACKED)
    done = subprocess.run([sys.executable, "-c", WORKER], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not Path("out").exists()
    (left,) = workspace.root.glob(".out-*")
    assert not (left / "config.json").exists()
    for file in left.iterdir():
        with pytest.raises(SafetensorError):
            load_file(file)
    # The next export to the same place removes what it left, and nothing else.
    mine = [workspace.root / name for name in (".out-notes", ".out-abcdefgh", ".other-abcdefgh.partial")]
    for folder in mine:
        folder.mkdir()
    with partial_folder(Path("out")) as living:
        assert not left.exists()
        writing.write_model(Recipe.from_yaml(STACKED), Sources(workspace.root), Path("out"))
        assert living.exists()
    assert all(folder.exists() for folder in mine)
    assert [*workspace.root.glob(".out-*.partial")] == []
    assert AutoModelForCausalLM.from_pretrained("out").config.num_hidden_layers == 3


MEASURE = """
from pathlib import Path
import torch
torch.set_num_threads(1)
from llmevo.merging.writer import write_model
from llmevo.models import safetensors_writer
from llmevo.merging.recipe import Recipe
from llmevo.models.sources import Sources
from support.memory import peak_of

small = Recipe.from_yaml(Path("small.yml").read_text())
write_model(small, Sources(), Path("warm"))  # what is loaded and compiled the first time is no part of it
large = Recipe.from_yaml(Path("large.yml").read_text())

def write():
    write_model(large, Sources(), Path("out"))
    safetensors_writer.SHARD_BYTES = 10**8
    write_model(large, Sources(), Path("sharded"))

print(peak_of(write))
"""


def large_checkpoint(folder: Path, layers: int, size: int, seed: int) -> None:
    """A checkpoint in the shape of a Llama, written as it is made; each layer has two weights of size × size."""
    random = torch.Generator().manual_seed(seed)
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(layers) for part in ("up", "down")]
    noise = torch.randn(size, size, generator=random).bfloat16()
    weights = {name: noise.roll(place, 0) for place, name in enumerate(names)}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": layers, "vocab_size": size}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_merge_to_the_disk_needs_the_memory_of_a_few_weights(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        large_checkpoint(tmp_path / name, 18, 2048, seed)
        large_checkpoint(tmp_path / f"small-{name}", 1, 64, seed)
    assert (tmp_path / "one" / "model.safetensors").stat().st_size > 300e6
    for kind, prefix in (("large", ""), ("small", "small-")):
        models = [{"model": f"{prefix}{name}", "parameters": {"weight": 0.5}} for name in ("one", "two")]
        (tmp_path / f"{kind}.yml").write_text(json.dumps({"merge_method": "linear", "models": models}))
    assert float(printed_by(MEASURE, tmp_path)) < 100
    expected = safe_names(tmp_path / "one" / "model.safetensors")
    for folder, many in (("out", 1), ("sharded", 4)):
        files = sorted((tmp_path / folder).glob("*.safetensors"))
        assert len(files) == many
        assert sorted(name for file in files for name in safe_names(file)) == sorted(expected)


def safe_names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:  # pyright: ignore[reportNoOverloadImplementation]
        return [*opened.keys()]


def test_large_models_are_written_in_shards_that_transformers_reads(
    finished: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished.llmevo("export", "run", "whole")
    monkeypatch.setattr(shards, "SHARD_BYTES", 8_000)
    finished.llmevo("export", "run", "sharded")
    index = json.loads(Path("sharded/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    one, two = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("whole", "sharded"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_stacked_layers_change_the_depth_in_the_config(workspace: Workspace) -> None:
    writing.write_model(Recipe.from_yaml(STACKED), Sources(workspace.root), Path("deep"))
    assert json.loads(Path("deep/config.json").read_text())["num_hidden_layers"] == 3
    assert AutoModelForCausalLM.from_pretrained("deep").config.num_hidden_layers == 3


def test_what_a_config_says_of_each_layer_goes_with_the_layer(workspace: Workspace) -> None:
    for name in ("one", "two"):
        config = json.loads(Path(name, "config.json").read_text())
        Path(name, "config.json").write_text(json.dumps({**config, "layer_types": ["first", "second"]}))
    writing.write_model(Recipe.from_yaml(STACKED), Sources(workspace.root), Path("deep"))
    assert json.loads(Path("deep/config.json").read_text())["layer_types"] == ["first", "second", "second"]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [*shards.SAFETENSORS_TYPES])
def test_a_weight_of_any_shape_and_type_is_read_as_it_was_written(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = {"some ‘name’": (torch.rand(shape) * 9).to(dtype), "b": torch.arange(6.0).view(2, 3).T}
    header = shards.header_size((name, tuple(weight.shape)) for name, weight in weights.items())
    assert shards.write_weights(iter(weights.items()), tmp_path, header) == {
        str(weight.dtype).removeprefix("torch.") for weight in weights.values()
    }
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        assert read[name].dtype == weight.dtype
        assert torch.equal(read[name], weight)


@pytest.mark.parametrize(
    ("files", "tokens"),
    [
        (
            {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "c"}]}},
            "abc",
        ),
        ({"tokenizer.json": {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}}, "ab"),
        ({"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"c": 2}}, "abc"),
        (
            {
                "tokenizer.json": {"model": {"vocab": {"a": 0}}},
                "tokenizer_config.json": {"added_tokens_decoder": {"1": {"content": "b"}}},
            },
            "ab",
        ),
        ({}, ""),
    ],
)
def test_a_vocabulary_is_read_from_the_tokenizers_files(files: dict[str, Any], tokens: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert vocabulary(tmp_path) == {token: place for place, token in enumerate(tokens)}


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match=r"tokenizer\.json is not valid JSON"):
        vocabulary(tmp_path)


def test_a_template_that_llmevo_does_not_have_is_refused_with_the_way_out(workspace: Workspace) -> None:
    for name in ("no-such", "../config", "x/../chatml"):
        recipe = Recipe.from_yaml(f"{STACKED}\nchat_template: {name}")
        with pytest.raises(RecipeError, match=r"give the template's own text, or `auto`"):
            writing.write_model(recipe, Sources(workspace.root), Path("out"))


def test_a_folder_that_was_not_finished_is_removed_before_another_process_can_lock_it(tmp_path: Path) -> None:
    """Two processes that remove the same folder fail both."""
    locked: list[bool] = []

    def remove(folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        locked.append(True)
        folder.rmdir()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmevo.models.files.shutil.rmtree", remove)
        with partial_folder(tmp_path / "out"):
            pass
    assert locked
    assert not [*tmp_path.iterdir()]
