"""Merges and fine-tunes as LoRA adapters: PEFT reads them, and what they hold is what they report."""

import json
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llmevo.errors import SourceError, UserError
from llmevo.export.extract import extract
from llmevo.export.formats import Format
from llmevo.export.lora import REPORT, LoraReport, Modules, write_adapter, write_merge
from llmevo.export.low_rank import Rank, decompose, rank_of, share_parameters
from llmevo.export.merge import merge
from llmevo.merging.recipe import Recipe
from llmevo.models.adapters import LoraModel
from llmevo.models.checkpoints import Checkpoint
from llmevo.models.references import ModelPath
from llmevo.models.sources import Sources
from support.checkpoints import assert_near, merged_by_peft, new_adapter, new_checkpoint, quietly, tensors, weights_of
from support.families import FAMILIES, VISION, new_family
from support.tiny_model import save_tiny, tiny_llama, tiny_tokenizer
from support.workspace import Workspace

TEXT = """
merge_method: {method}
base_model: base
models:
  - {{model: base+a, parameters: {{weight: 0.7}}}}
  - {{model: base+b, parameters: {{weight: {second}}}}}
dtype: float32
parameters: {{{more}}}
"""

PROJECTED = re.compile(r"^(?!.*vis).*layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.weight$")
"""The matrices of a language model's layers, beside those of an image's."""


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model `base` and two adapters of it, of other modules and ranks."""
    monkeypatch.chdir(tmp_path)
    base = new_checkpoint(Path("base"))
    new_adapter(Path("a"), base, 1)
    new_adapter(Path("b"), base, 2, r=4, target_modules=["q_proj", "up_proj"], use_rslora=True)
    return tmp_path


def recipe_of(method: str = "task_arithmetic", second: float = -0.4, more: str = "") -> Recipe:
    return Recipe.from_yaml(TEXT.format(method=method, second=second, more=more))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8]])).logits


def with_peft(base: Path, adapter: Path) -> Any:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return quietly(lambda: PeftModel.from_pretrained(plain, adapter)).eval()


def lost(adapter: Path, wanted: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """The relative error of an adapter against the weights that it stands for, as PEFT merges it."""
    found = merged_by_peft(Path("base"), adapter)
    error = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    change = sum(float((base[name] - wanted[name]).square().sum()) for name in wanted)
    return (error / change) ** 0.5


@pytest.mark.parametrize(
    ("method", "second", "more"),
    [
        ("task_arithmetic", -0.4, ""),
        ("task_arithmetic", 0.3, "normalize: true, lambda: 0.8"),
        ("linear", 0.3, "normalize: false"),
        ("linear", 0.9, "normalize: true"),
    ],
)
@pytest.mark.usefixtures("adapters")
def test_a_sum_of_adapters_is_exactly_one_adapter(method: str, second: float, more: str) -> None:
    recipe = recipe_of(method, second, more)
    report = write_merge(recipe, Sources(), Path("lora"), None)
    merge(recipe, "whole")
    assert report.exact
    assert report.rank == 6
    assert_near(merged_by_peft(Path("base"), Path("lora")), weights_of(Path("whole")), atol=1e-6)
    whole: Any = AutoModelForCausalLM.from_pretrained("whole", dtype=torch.float32).eval()
    assert torch.allclose(logits(with_peft(Path("base"), Path("lora"))), logits(whole), atol=1e-5)
    assert not torch.allclose(logits(with_peft(Path("base"), Path("a"))), logits(whole), atol=1e-2)
    config = json.loads(Path("lora/adapter_config.json").read_text())
    assert (config["r"], config["modules_to_save"]) == (6, None)
    assert config["base_model_name_or_path"] == str(Path("base").resolve())  # PEFT finds it from any folder
    assert {*config["target_modules"]} == {"q_proj", "down_proj", "up_proj"}
    assert config["alpha_pattern"] == config["rank_pattern"]  # the scale is 1 everywhere


@pytest.mark.usefixtures("adapters")
def test_llmevo_reads_its_own_adapter() -> None:
    merge(recipe_of(), "lora", as_="lora")
    merge(recipe_of(), "whole")
    alone = Recipe.from_yaml(
        "merge_method: linear\nmodels: [{model: base+lora, parameters: {weight: 1}}]\ndtype: float32"
    )
    merge(alone, "again")
    assert_near(weights_of(Path("again")), weights_of(Path("whole")), atol=1e-6)


@pytest.mark.usefixtures("adapters")
def test_the_reported_error_is_the_error_and_a_larger_rank_has_less() -> None:
    merge(recipe_of(), "whole")
    wanted, base = weights_of(Path("whole")), weights_of(Path("base"))
    reports: list[Any] = []
    for number, (rank, energy, parameters) in enumerate(
        [(1, None, None), (3, None, None), ("auto", 0.6, None), ("auto", None, "1k"), ("exact", None, None)]
    ):
        out = Path(f"out{number}")
        report = write_merge(recipe_of(), Sources(), out, Rank.of(rank, energy, parameters))
        assert lost(out, wanted, base) == pytest.approx(report.error, abs=1e-5)
        assert report.energy == pytest.approx(1 - report.error**2)
        numbers = sum(tensor.numel() for tensor in load_file(out / "adapter_model.safetensors").values())
        assert numbers == report.parameters
        told = json.loads((out / REPORT).read_text())
        assert told["energy"] == report.energy
        assert told["matrices"].keys() == report.matrices.keys()
        reports.append(report)
        if energy:
            assert all(of.energy >= energy for of in report.matrices.values())
        if parameters:
            assert 900 < report.parameters <= 1000
    assert reports[0].error > reports[1].error > reports[4].error == 0
    assert reports[4].exact


@pytest.mark.usefixtures("adapters")
def test_a_budget_has_the_least_error_of_all_ranks_within_it() -> None:
    shapes = {"a": (4, 6), "b": (8, 12)}
    values = {"a": torch.tensor([3.0, 1.0, 0.5]), "b": torch.tensor([4.0, 3.9, 0.1])}

    def error(first: int, second: int) -> float:
        return sum(float(of[rank:].square().sum()) for of, rank in zip(values.values(), (first, second), strict=True))

    for budget in range(10, 100, 10):
        ranks = share_parameters(budget, values, shapes)
        best = min(error(i, j) for i in range(4) for j in range(4) if 10 * i + 20 * j <= budget)
        greedy, used = error(ranks["a"], ranks["b"]), 10 * ranks["a"] + 20 * ranks["b"]
        assert used <= budget
        assert greedy <= best + 1e-6 or budget - used < 20  # what is left is too little for the other matrix


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_other_methods_are_truncated_and_say_so(method: str) -> None:
    text = f"""
merge_method: {method}
base_model: base
models: [{{model: base+a, parameters: {{weight: 0.7}}}}, {{model: base+b, parameters: {{weight: 0.5}}}}]
parameters: {{density: 0.6}}
dtype: float32
"""
    recipe = Recipe.from_yaml(text)
    merge(recipe, "whole", seed=3)
    report = write_merge(recipe, Sources(), Path("lora"), None, seed=3)
    assert not report.exact
    assert 0.95 <= report.energy < 0.999
    assert lost(Path("lora"), weights_of(Path("whole")), weights_of(Path("base"))) == pytest.approx(
        report.error, abs=1e-4
    )


def fine_tune(folder: Path, base: Path, part: str, seed: int = 5) -> dict[str, Tensor]:
    """Change every tensor whose name holds `part`, and save the model."""
    random = torch.Generator().manual_seed(seed)
    weights = {
        name: weight + torch.randn(weight.shape, generator=random) * 0.02 if part in name else weight
        for name, weight in weights_of(base).items()
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((base / "config.json").read_text())
    return weights


@pytest.mark.parametrize(
    ("part", "tied", "family"),
    [
        ("", False, "llama"),
        ("", True, "llama"),
        ("layers.1", False, "qwen2"),  # biases of q, k and v; norms of one layer only
        ("norm", False, "llama"),
        ("model.norm", False, "llama"),  # the names of all norms end so
        ("embed", True, "llama"),
        ("bias", False, "qwen2"),
    ],
)
def test_whatever_a_fine_tune_changed_is_in_its_adapter(
    part: str, tied: bool, family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = new_checkpoint(Path("base"), tied=tied, family=family)
    wanted = fine_tune(Path("tuned"), base, part)
    report = extract("tuned", "base", "lora", rank="exact").report
    tuned: Any = AutoModelForCausalLM.from_pretrained("tuned", dtype=torch.float32).eval()
    plain: Any = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32).eval()
    assert torch.allclose(logits(with_peft(base, Path("lora"))), logits(tuned), atol=1e-4)
    assert not torch.allclose(logits(plain), logits(tuned), atol=1e-3)
    changed = {name for name, weight in wanted.items() if not torch.equal(weight, weights_of(base)[name])}
    held = {f"{module}.weight" for module in report.matrices} | {*report.saved_whole}
    assert held == changed
    assert_near(tensors(LoraModel(Checkpoint(base), Path("lora"))), wanted, atol=1e-5)
    assert bool(report.saved_whole) == any("vLLM does not" in limit for limit in report.limits)
    assert report.servers == ("PEFT" if report.saved_whole else "PEFT and vLLM")
    sizes = {name: weight.numel() for name, weight in load_file("lora/adapter_model.safetensors").items()}
    factors = sum(size for name, size in sizes.items() if ".lora_" in name)
    assert (report.parameters, report.parameters_whole) == (factors, sum(sizes.values()) - factors)


@pytest.mark.parametrize("family", [name for name, of in FAMILIES.items() if of.kind == VISION])
def test_a_model_of_images_and_text_is_adapted_though_its_file_has_other_names(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    new_family(tmp_path, family)
    base, tuned = weights_of(Path("base")), weights_of(Path("one"))
    wanted = {name: tuned[name] if PROJECTED.search(name) else weight for name, weight in base.items()}
    save_file(wanted, "one/model.safetensors", {"format": "pt"})
    report = extract("one", "base", "lora", energy=1 - 1e-10).report
    assert len(report.matrices) == 14  # the tower is as it was
    assert not report.saved_whole
    assert_near(tensors(LoraModel(Checkpoint(Path("base")), Path("lora"))), wanted, atol=1e-5)
    plain, own = (loaded_images(Path(name)) for name in ("base", "one"))
    before = logits(plain)
    adapted = quietly(lambda: PeftModel.from_pretrained(plain, "lora")).eval()
    assert torch.allclose(logits(adapted), logits(own), atol=1e-3)
    assert not torch.allclose(before, logits(own), atol=0.1)


def loaded_images(folder: Path) -> Any:
    return quietly(lambda: AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)).eval()


@pytest.mark.parametrize("prefix", ["transformer.", ""], ids=["prefix", "as on the hub"])
def test_gpt2_is_adapted_though_its_matrices_are_turned(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=4)).save_pretrained("base")
    named = {name.replace("transformer.", prefix, 1): weight for name, weight in weights_of(Path("base")).items()}
    save_file(named, "base/model.safetensors", {"format": "pt"})
    fine_tune(Path("tuned"), Path("base"), "c_", 1)
    report = extract("tuned", "base", "lora", rank="exact").report
    assert report.matrices["transformer.h.0.mlp.c_fc"].rank == 16
    tuned: Any = AutoModelForCausalLM.from_pretrained("tuned", dtype=torch.float32).eval()
    assert torch.allclose(logits(with_peft(Path("base"), Path("lora"))), logits(tuned), atol=1e-4)


def test_a_parameter_beside_matrices_in_its_module_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)).save_pretrained(
        "base"
    )
    fine_tune(Path("tuned"), Path("base"), "in_proj")
    report = extract("tuned", "base", "lora", rank="exact").report
    tuned: Any = AutoModelForCausalLM.from_pretrained("tuned", dtype=torch.float32).eval()
    assert len(report.matrices) == 2
    assert torch.allclose(logits(with_peft(Path("base"), Path("lora"))), logits(tuned), atol=1e-4)
    fine_tune(Path("more"), Path("tuned"), "A_log")
    with pytest.raises(UserError, match=r"mixer\.A_log changed, and PEFT saves backbone\.layers\.0\.mixer only whole"):
        extract("more", "base", "out", rank="exact")
    assert not Path("out").exists()


def test_a_large_matrix_is_decomposed_at_random_with_its_true_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmevo.export.low_rank.SMALL", 16)
    monkeypatch.setattr("llmevo.export.low_rank.LARGEST", 12)
    random = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(120, 60, generator=random))
    right, _ = torch.linalg.qr(torch.randn(90, 60, generator=random))
    matrix = left @ torch.diag(0.8 ** torch.arange(60.0)) @ right.T
    found, again = decompose(matrix), decompose(matrix)
    assert torch.equal(found.values, again.values)
    rank = rank_of(Rank(fixed=8), found)
    down, up = found.balanced(rank)
    report = LoraReport("base", False)
    report.add("m", (120, 90), found, rank, 1.0)
    best = torch.linalg.svdvals(matrix)
    assert float((matrix - up @ down).norm() / matrix.norm()) == pytest.approx(report.error, rel=1e-3)
    assert report.error == pytest.approx(float(best[8:].norm() / best.norm()), rel=0.01)
    assert decompose(matrix, 40).values.numel() >= 40


def test_extract_asks_the_users_tasks_of_all_three_models(workspace: Workspace) -> None:
    config = workspace.config()
    status, printed = workspace.llmevo("extract", "one", "base", "lora", "--energy", "0.9", "--tasks", config)
    assert status == 0, printed
    told = json.loads(Path("lora", REPORT).read_text())
    assert [*told["scores"]] == ["base", "fine-tune", "adapter"]
    assert "base + adapter" in printed
    assert "matrices with the largest error" in printed
    assert "lora is a LoRA adapter for PEFT, on base" in printed
    assert f"; {told['parameters_whole']:,} more in 1 tensor saved whole" in printed
    assert "1 tensor changed that no low-rank factors can hold, and is saved whole" in printed
    several = LoraReport("", False, saved_whole=["a", "b", "c"])
    assert several.limits[0].startswith("3 tensors changed that no low-rank factors can hold, and are saved whole")
    status, printed = workspace.llmevo("extract", "one", "base", "all", "--rank", "exact")
    assert (status, "relative error" in printed, "matrices with the largest error" in printed) == (0, True, False)
    exact = extract("one", "base", "exact", rank="exact", tasks=config)
    by_name = {of.model: of for of in exact.scores}
    assert by_name["adapter"].tasks == by_name["fine-tune"].tasks
    assert by_name["base"].score == told["scores"]["base"]["score"]


def test_the_adapter_of_a_run_has_its_card_and_recipe(workspace: Workspace) -> None:
    workspace.finished()
    status, printed = workspace.llmevo("export", "run", "lora", "--as", "lora", "--rank", "auto", "--energy", "0.8")
    assert status == 0, printed
    names = {file.name for file in Path("lora").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", REPORT, "README.md", "mergekit_config.yml"}
    card = Path("lora/README.md").read_text()
    assert "# A merge found by llmevo" in card
    assert "library_name: peft" in card
    assert "of the squared singular values" in card


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--as", "lora", "--rank", "0"], "--rank 0: give a whole number from 1, auto or exact"),
        (["--as", "lora", "--rank", "many"], "--rank many: give a whole number from 1"),
        (["--as", "lora", "--rank", "33"], "--rank 33: no changed matrix has so many singular values"),
        (["--as", "lora", "--energy", "1.5"], "--energy 1.5: it is a share"),
        (["--as", "lora", "--rank", "4", "--energy", "0.5"], "--rank 4 and --energy 0.5 both choose the ranks"),
        (["--as", "lora", "--parameters", "10M", "--energy", "0.5"], "--parameters 10M and --energy 0.5 both choose"),
        (["--as", "lora", "--parameters", "ten"], "--parameters ten: give a number of parameters"),
        (["--as", "lora", "--parameters", "5"], "--parameters 5: too few for any matrix; rank 1 of the smallest"),
        (["--rank", "4"], "--rank 4: only adapters have ranks; add --as lora"),
        (["--as", "lora", "--donor", "x.gguf"], "--donor x.gguf: only GGUF files need a donor"),
        (["--as", "lroa"], "--as lroa: there is no such format, did you mean 'lora'?"),
        (["--as", "gguf:q5_k"], "--as gguf:q5_k: there is no such format; write one of gguf:q8_0"),
        (["--as", "gguf"], "--as gguf: there is no such format; write one of gguf:q8_0"),
    ],
)
def test_a_wrong_option_is_one_clear_line_and_nothing_is_written(
    words: list[str], says: str, workspace: Workspace
) -> None:
    Path("recipe.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: one, parameters: {weight: 0.5}}]"
    )
    status, printed = workspace.llmevo("merge", "recipe.yml", "out", *words)
    assert (status, says in printed, printed.count("\n")) == (2, True, 1), printed
    assert not [path for path in workspace.root.iterdir() if "out" in path.name]


@pytest.mark.usefixtures("adapters")
def test_adapters_alone_are_merged_as_adapters_on_their_model() -> None:
    made: list[dict[str, Tensor]] = []
    for out, names in (("whole", ("base+a", "base+b")), ("alone", ("a", "b"))):
        models = [{"model": name, "parameters": {"weight": 0.5}} for name in names]
        merge(Recipe.model_validate({"merge_method": "linear", "models": models, "dtype": "float32"}), out, as_="lora")
        report = json.loads(Path(out, "lora_report.json").read_text())
        assert report["exact"]
        named = json.loads(Path(out, "adapter_config.json").read_text())["base_model_name_or_path"]
        assert Path(named).resolve() == Path("base").resolve()
        made.append(merged_by_peft(Path("base"), Path(out)))
    assert_near(made[0], made[1], atol=1e-6)
    assert extract("a", "base", "out", rank="exact").report.rank == 2
    with pytest.raises(SourceError, match=r"BASE a: it has an adapter; name the plain model, .*base"):
        extract("b", "a", "again")


@pytest.mark.usefixtures("adapters")
def test_the_base_of_an_adapter_is_named_as_peft_finds_it_and_without_its_place_to_share_it() -> None:
    Path("elsewhere").mkdir()
    recipe = {"merge_method": "task_arithmetic", "base_model": "../base", "dtype": "float32"}
    models = [{"model": "../base+../a", "parameters": {"weight": 0.5}}]
    Path("elsewhere/recipe.yml").write_text(json.dumps({**recipe, "models": models}))
    merge("elsewhere/recipe.yml", "near", as_="lora")
    assert quietly(lambda: AutoPeftModelForCausalLM.from_pretrained("near")) is not None
    config = json.loads(Path("a/adapter_config.json").read_text())
    Path("a/adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(Path("base").resolve())})
    )
    alone = Recipe.from_yaml("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]")
    for folder, shared in (("kept", False), ("shared", True)):
        Format("lora").write(alone, Sources(), Path(folder), 0, lambda *_: {}, to_share=shared)
        said = [json.loads(Path(folder, name).read_text()) for name in ("adapter_config.json", REPORT)]
        named = {said[0]["base_model_name_or_path"], said[1]["base_model"]}
        assert named == ({f"./{Path().resolve().name}/base"} if shared else {str(Path("base").resolve())})


def test_a_revision_of_the_base_has_its_own_key_as_peft_reads_it(tmp_path: Path) -> None:
    base = Checkpoint(new_checkpoint(tmp_path / "base"))
    changes = {name: base.tensor(name) * 1.5 for name in base.shapes if "q_proj" in name}
    modules = Modules(tmp_path / "base", base.shapes)
    named = ModelPath(path="org/base", revision="v1")
    write_adapter(lambda: iter(changes.items()), base, modules, named, tmp_path / "out", Rank.of(2))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v1")


@pytest.mark.usefixtures("adapters")
def test_what_an_adapter_cannot_hold_is_refused() -> None:
    stacked = """
merge_method: passthrough
slices: [{sources: [{model: base, layer_range: [0, 4]}]}, {sources: [{model: base, layer_range: [3, 4]}]}]
"""
    with pytest.raises(
        UserError, match="the merge has 5 layers and base has 4; an adapter cannot add or remove layers"
    ):
        merge(Recipe.from_yaml(stacked), "out", as_="lora")
    new_checkpoint(Path("wide"), hidden=32)
    with pytest.raises(SourceError, match="different shapes"):
        extract("wide", "base", "out")
    with pytest.raises(SourceError, match="are the same model"):
        extract("base", "base", "out")
    new_checkpoint(Path("tied"), tied=True)
    weights = load_file("tied/model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    for change, says in (
        ({"model.embed_tokens.weight": torch.cat([embeddings, embeddings[:2]])}, "an adapter cannot add or remove"),
        ({"lm_head.weight": embeddings * 2}, "has an output head of its own .* an adapter cannot part them"),
    ):
        shutil.rmtree("tuned", ignore_errors=True)
        shutil.copytree("tied", "tuned")
        save_file({**weights, **change}, "tuned/model.safetensors", {"format": "pt"})
        with pytest.raises(SourceError, match=says):
            extract("tuned", "tied", "out")
    with pytest.raises(SourceError, match=r"BASE base\+a: it has an adapter; name the plain model, base"):
        extract("base", "base+a", "out")
    alone = Recipe.from_yaml("merge_method: linear\nmodels: [{model: base, parameters: {weight: 1}}]")
    with pytest.raises(UserError, match=r"the model does not differ from \S+/base"):
        merge(alone, "out", as_="lora")
    Path("taken").mkdir()
    Path("taken/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="taken exists already"):
        extract("base+a", "base", "taken")
    assert not [path for path in Path().iterdir() if "out" in path.name]
    assert [path.name for path in Path("taken").iterdir()] == ["mine.txt"]


@pytest.mark.usefixtures("adapters")
def test_a_fine_tune_whose_config_computes_something_else_is_no_adapter() -> None:
    shutil.copytree("base", "tuned")
    weights = load_file("base/model.safetensors")
    save_file({name: weight * 1.1 for name, weight in weights.items()}, "tuned/model.safetensors", {"format": "pt"})
    file = Path("tuned/config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "max_position_embeddings": 4096, "unsloth_version": "1", "use_cache": False}))
    assert extract("tuned", "base", "same").report.rank
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    for key, value in (("rms_norm_eps", 0.5), ("rope_parameters", rope)):
        file.write_text(json.dumps({**config, key: value}))
        with pytest.raises(SourceError, match=f"tuned: {key} is .* in its config.json and .* in that of base"):
            extract("tuned", "base", "out")
        assert not Path("out").exists()


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_an_adapter_of_another_function_than_the_merge_is_refused(method: str) -> None:
    names = ["base+a", "base+b", *(["base"] if method == "ties" else [])]
    given = {"merge_method": method, "base_model": "base", "parameters": {"weight": 0.5}, "dtype": "float32"}
    sources = [{"model": name, "layer_range": [0, 3]} for name in names]
    with pytest.raises(UserError, match="--as lora: the merge has 3 layers and base has 4"):
        merge(Recipe.model_validate({**given, "slices": [{"sources": sources}]}), "out", as_="lora")
    models = [{"model": name} for name in names]
    with pytest.raises(UserError, match="the merge has another rope_parameters in its config"):
        merge(Recipe.model_validate({**given, "models": models, "rope": 0.5}), "out", as_="lora")
    assert not Path("out").exists()


def test_layers_of_several_kinds_in_another_order_are_no_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = ["full_attention", "full_attention", "sliding_attention"]
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = Qwen2Config(
        vocab_size=64, num_hidden_layers=3, layer_types=kinds, sliding_window=2, use_sliding_window=True, **shape
    )
    Qwen2ForCausalLM(config).save_pretrained("base")
    slices = [{"sources": [{"model": "base", "layer_range": [at, at + 1]}]} for at in (1, 0, 2)]
    recipe = Recipe.model_validate({"merge_method": "passthrough", "slices": slices})
    merge(recipe, "alike", as_="lora")  # these are of one kind
    swapped = Recipe.model_validate({"merge_method": "passthrough", "slices": [slices[place] for place in (0, 2, 1)]})
    with pytest.raises(UserError, match="the merge has another layer_types in its config"):
        merge(swapped, "out", as_="lora")


def test_an_adapter_of_a_merge_by_token_needs_the_tokens_of_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("base"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tiny_llama(1, vocab_size=len(tokenizer)).save_pretrained("more")
    tokenizer.save_pretrained("more")
    new_adapter(Path("a"), Path("base"))
    text = """
merge_method: task_arithmetic
base_model: base
models: [{model: more, parameters: {weight: 0.5}}, {model: base+a, parameters: {weight: 0.5}}]
tokenizer_source: %s
dtype: float32
"""
    with pytest.raises(UserError, match="the tokens of the merge are not those of base"):
        merge(Recipe.from_yaml(text % "union"), "out", as_="lora")
    recipe = Recipe.from_yaml(text % "base")
    merge(recipe, "lora", as_="lora", rank="exact")
    merge(recipe, "whole")
    assert_near(merged_by_peft(Path("base"), Path("lora")), weights_of(Path("whole")), atol=1e-5)


def test_a_weight_that_is_not_finite_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = new_checkpoint(Path("base"))
    weights = fine_tune(Path("tuned"), base, "q_proj")
    weights["model.layers.3.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, Path("tuned/model.safetensors"), {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.3\.self_attn\.q_proj\.weight has numbers that are not finite"):
        extract("tuned", "base", "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.usefixtures("adapters")
def test_an_adapter_of_a_fine_tune_that_is_an_adapter_is_exact() -> None:
    made = extract("base+b", "base", "out", rank="exact")
    assert made.report.rank == 4
    assert_near(merged_by_peft(Path("base"), Path("out")), merged_by_peft(Path("base"), Path("b")), atol=1e-6)


@pytest.mark.vllm
def test_vllm_serves_the_adapter_with_the_answers_of_the_whole_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmevo.engines.vllm import VllmEngine

    vllm, lora = import_module("vllm"), import_module("vllm.lora.request")

    monkeypatch.chdir(tmp_path)
    base = save_tiny(Path("base"), hidden_size=128, intermediate_size=128)
    for seed, name in enumerate(("a", "b")):
        new_adapter(Path(name), base, seed, r=8, lora_alpha=16)
    merge(recipe_of(), Path("whole"))
    merge(recipe_of(), Path("adapter"), as_="lora")
    prompts: list[Any] = [{"prompt_token_ids": tokens} for tokens in ([2, 20, 33, 41], [2, 5, 6, 7], [2, 50, 9, 12])]
    greedy = vllm.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

    def answers(folder: Path, options: dict[str, Any], *adapters: Any) -> list[list[list[int]]]:
        engine = VllmEngine(folder, folder, "float32", options={"max_model_len": 64, **options})
        try:
            asked = [engine.lm.llm.generate(prompts, greedy, use_tqdm=False, lora_request=of) for of in adapters]
        finally:
            engine.close()
        return [[[*reply.outputs[0].token_ids] for reply in replies] for replies in asked]

    (merged,) = answers(Path("whole"), {}, None)
    request = lora.LoRARequest("merge", 1, str(Path("adapter").absolute()))
    plain, adapted = answers(base, {"enable_lora": True, "max_lora_rank": 16}, None, request)
    assert adapted == merged
    assert plain != merged
