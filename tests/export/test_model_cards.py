"""Model cards as the hub reads them: metadata that huggingface_hub parses, licences, results."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llmevo.export.cards import Metadata, Parent
from llmevo.export.merge import merge
from llmevo.merging.recipe import Recipe
from llmevo.models.licences import strictest
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from support.checkpoints import new_adapter, new_checkpoint
from support.workspace import Workspace


def card(parents: list[Parent], **more: object) -> ModelCard:
    return ModelCard(Metadata(parents, **more).to_yaml() + "# A model\n")  # pyright: ignore[reportArgumentType]


def test_parents_are_named_once_without_revisions_and_local_ones_not_at_all() -> None:
    parents = [
        Parent("org/base", None, "apache-2.0"),
        Parent("org/base@main+org/adapter@v1", "v1", "apache-2.0"),
        Parent("org/base+./mine", None, "apache-2.0"),
        Parent("package:llm_x/model.gguf", None, "apache-2.0"),
        Parent("models/two", None, "apache-2.0"),
        Parent("org/mixture@main#expert=3", None, "apache-2.0"),
        Parent("org/quantized/model-Q8_0.gguf", None, "apache-2.0"),
    ]
    data = card(parents, local=["./mine", "models/two"]).data.to_dict()
    assert data["base_model"] == ["org/base", "org/adapter", "org/mixture", "org/quantized"]
    assert data["base_model_relation"] == "merge"
    assert data["license"] == "apache-2.0"
    assert {"merge", "llmevo", "mergekit"} <= {*data["tags"]}
    alone = card([Parent("package:llm_x/model.gguf", None, "mit")]).data.to_dict()
    assert not {"base_model", "base_model_relation"} & {key for key, value in alone.items() if value}


@pytest.mark.parametrize(
    ("licences", "licence", "says"),
    [
        (["mit", "mit"], "mit", ""),
        (["mit", "apache-2.0"], "apache-2.0", ""),
        (["apache-2.0", '"Llama3.1"'], "llama3.1", ""),
        (["apache-2.0", "cc-by-nc-4.0", "mit"], "cc-by-nc-4.0", ""),
        (["apache-2.0", None], None, "that of model 1 is not known"),
        (["other", "mit"], None, "that of model 0 is not known"),
        (["gemma", "llama3.1"], None, "ask for different things (model 0 is under gemma, model 1 is under llama3.1)"),
        (["apache-2.0 and gemma", "mit"], "gemma", ""),
        (["apache-2.0 and unknown"], None, "that of model 0 is not known"),
        (["cc-by-nd-4.0", "mit"], None, "allows no derived works"),
    ],
)
def test_the_licence_is_that_of_the_strictest_parent_or_none_with_the_reason(
    licences: list[str | None], licence: str | None, says: str
) -> None:
    found, note = strictest((f"model {place}", name) for place, name in enumerate(licences))
    assert found == licence
    assert says in note
    assert bool(note) == (licence is None)


def test_the_held_out_scores_are_the_results_that_the_hub_shows(workspace: Workspace) -> None:
    workspace.finished()
    assert workspace.llmevo("export", "run", "out")[0] == 0
    state = workspace.state("run")
    read = ModelCard(Path("out/README.md").read_text())
    results = read.data.to_dict()["model-index"][0]["results"]
    assert [(of["dataset"]["type"], of["metrics"][0]["type"]) for of in results] == [("letters_heldout", "acc")]
    held = state.heldout["best"].tasks["letters_heldout"]["acc,none"]
    assert results[0]["metrics"][0]["value"] == pytest.approx(held, abs=1e-6)
    assert "model-index" in Path("out/README.md").read_text()
    assert "No licence is given, as that of" in read.text
    asked = {row.candidate for row in state.heldout.values()}
    other = next(number for number in state.trials if number not in asked)
    assert workspace.llmevo("export", "run", "other", "--candidate", other)[0] == 0
    assert "model-index" not in ModelCard(Path("other/README.md").read_text()).data.to_dict()


def test_scores_stand_for_the_weights_that_had_them(workspace: Workspace) -> None:
    engine = {"backend": "hf", "device": "cpu", "self_check": False, "quantize": "fp8"}
    search = {"optimizer": "random", "budget": 7, "seed": 3, "finalists": 2}
    workspace.finished(engine=engine, search=search)
    state, cards = workspace.state("run"), dict[str, ModelCard]()
    for kind in ("model", "lora", "fp8"):
        status, printed = workspace.llmevo("export", "run", kind, *([] if kind == "model" else ["--as", kind]))
        assert status == 0, printed
        cards[kind] = ModelCard(Path(kind, "README.md").read_text())
    own = {kind: card.data.to_dict().get("model-index") for kind, card in cards.items()}
    assert own["lora"] is None
    for kind, row in (("model", "best"), ("fp8", "best (fp8)")):
        held = state.heldout[row].tasks["letters_heldout"]["acc,none"]
        index = own[kind]
        assert index
        assert index[0]["results"][0]["metrics"][0]["value"] == pytest.approx(held, abs=1e-6)
    assert "makes this model again, bit for bit" in cards["model"].text
    assert "Scores are of" not in cards["model"].text
    for kind, name in (("lora", "a LoRA adapter"), ("fp8", "FP8")):
        assert "bit for bit" not in cards[kind].text
        assert "MODEL` makes the merge that this file was made from;" in cards[kind].text
        assert f"Scores are of the merge before it was written as {name}." in cards[kind].text
    assert "The row `best (fp8)` is of the weights as they are here." in cards["fp8"].text


def test_the_recipe_of_a_merge_with_random_masks_gives_the_same_masks(workspace: Workspace) -> None:
    models = (
        "[{model: one, parameters: {weight: 1, density: 0.5}}, {model: two, parameters: {weight: 1, density: 0.5}}]"
    )
    Path("recipe.yml").write_text(f"merge_method: dare_linear\nbase_model: base\nmodels: {models}")
    assert workspace.llmevo("merge", "recipe.yml", "first", "--seed", 5)[0] == 0
    assert workspace.llmevo("merge", "first/mergekit_config.yml", "models/second")[0] == 0
    assert workspace.llmevo("merge", "models/second/mergekit_config.yml", "third")[0] == 0
    first, *others = (Path(name, "model.safetensors").read_bytes() for name in ("first", "models/second", "third"))
    assert others == [first, first]


def test_a_merged_recipe_has_a_card_and_the_recipe_beside_its_weights(workspace: Workspace) -> None:
    for name in ("one", "two"):
        Path(name, "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    Path("recipe.yml").write_text(
        "merge_method: linear\nmodels: [{model: one, parameters: {weight: 1}}, {model: two, parameters: {weight: 1}}]"
    )
    for options in ((), ("--as", "fp8")):
        out = f"out{len(options)}"
        status, printed = workspace.llmevo("merge", "recipe.yml", out, *options)
        assert status == 0, printed
        read = ModelCard(Path(out, "README.md").read_text())
        assert read.data.to_dict()["license"] == "mit"
        assert "| `one` |  | mit |" in read.text
        (text,) = re.findall(r"```yaml\n(.*?)```", read.text, re.DOTALL)
        beside = Recipe.from_yaml(Path(out, "mergekit_config.yml").read_text())
        assert beside == Recipe.from_yaml(text).seen_from(Path(out), Path())
        assert [*map(str, beside.references)] == ["../one", "../two"]
        assert workspace.llmevo("merge", f"{out}/mergekit_config.yml", f"again-{out}", *options)[0] == 0
        assert Path(f"again-{out}/model.safetensors").read_bytes() == Path(out, "model.safetensors").read_bytes()
        assert str(workspace.root) not in read.content


@pytest.mark.usefixtures("workspace")
def test_an_adapters_card_names_its_base_and_its_limits() -> None:
    recipe = Recipe.from_yaml(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: one, parameters: {weight: 0.5}}]"
    )
    merge(recipe, "out", as_="lora", rank=4)
    read = ModelCard(Path("out/README.md").read_text())
    assert read.data.to_dict()["library_name"] == "peft"
    assert "vLLM does not" in read.text  # the norms and embeddings of `one` are saved whole
    assert json.loads(Path("out/adapter_config.json").read_text())["modules_to_save"]


@pytest.mark.usefixtures("workspace")
def test_an_adapter_has_the_licence_of_its_model_as_well() -> None:
    base = new_checkpoint(Path("plain"))
    new_adapter(Path("adapter"), base, 1)
    (base / "README.md").write_text("---\nlicense: gemma\n---\n")
    sources, merged = Sources(), ModelReference.parse("plain+adapter")
    assert sources.licence(merged) == "gemma"  # the adapter's card says nothing else
    Path("adapter/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert sources.licence(merged) == "apache-2.0 and gemma"
    merge(Recipe.from_yaml("merge_method: linear\nmodels: [{model: plain+adapter, parameters: {weight: 1}}]"), "whole")
    assert ModelCard.load("whole/README.md").data.to_dict()["license"] == "gemma"
    (base / "README.md").unlink()
    assert sources.licence(merged) == "apache-2.0 and unknown"
