"""Models whose tokens differ: merged by token, as mergekit merges them, with a tokenizer that has all tokens."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmevo.config import read_config
from llmevo.engines.hf import HfEngine
from llmevo.errors import SourceError
from llmevo.export.merge import merge
from llmevo.merging.merger import merge as merge_weights
from llmevo.merging.recipe import Recipe
from llmevo.merging.vocabulary import ByToken, open_models
from llmevo.merging.writer import write_model
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.models.tokenizer import VOCABULARY
from llmevo.run.scorer import Scorer
from support.checkpoints import assert_near, assert_same_bits, merged_by_peft, new_adapter, quietly, weights_of
from support.families import new_family
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
    tokenizer.add_tokens([*added])  # pyright: ignore[reportArgumentType]
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
        models = [{**model, "parameters": {"weight": weights[str(model["model"])], "density": 0.5}} for model in models]
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


def test_rows_without_a_token_are_cut_off_of_a_multimodal_model_too(tmp_path: Path) -> None:
    folder = new_family(tmp_path, "Gemma 3", vocab_size=128) / "base"
    recipe = {"merge_method": "passthrough", "models": [{"model": "base"}], "base_model": "base"}
    write_model(Recipe.model_validate({**recipe, "tokenizer_source": "base"}), Sources(tmp_path), tmp_path / "out")
    rows = len(tiny_tokenizer())
    assert {len(of) for name, of in weights_of(tmp_path / "out").items() if VOCABULARY.search(name)} == {rows}
    assert json.loads((tmp_path / "out/config.json").read_text())["text_config"]["vocab_size"] == rows
    assert json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"] == 128


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
    new_models(workspace.root, **keys.pop("shape", {}))
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


def test_what_is_scored_is_what_is_exported(workspace: Workspace) -> None:
    scorer = Scorer(read_config(search_of(workspace)), workspace.root)
    engine: Any = scorer.engine
    tokens = engine.lm.tokenizer("<|im_start|>a hello<th><|im_end|>")["input_ids"]
    assert tokens[0] == BASE
    for place, genes in enumerate((scorer.space.uniform(), scorer.space.parent(ModelReference.parse("two")))):
        recipe, out = scorer.space.decode(genes), workspace.root / f"out-{place}"
        engine.swap(recipe)
        write_model(recipe, scorer.sources, out, 0, trim=False)
        exported: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            ids = torch.tensor([tokens])
            assert torch.equal(engine.model(ids).logits, exported(ids).logits)
        assert AutoTokenizer.from_pretrained(out).get_vocab() == engine.lm.tokenizer.get_vocab()
        assert exported.config.vocab_size == BASE + 4


def test_a_model_alone_in_a_union_is_itself(workspace: Workspace) -> None:
    scorer = Scorer(read_config(search_of(workspace, method="ties")), workspace.root)
    for name in ("one", "two", "base"):
        recipe = scorer.space.alone(ModelReference.parse(name))
        assert recipe.references == scorer.space.decode(scorer.space.uniform()).references
        made, own = dict(merge_weights(recipe, scorer.sources)), weights_of(workspace.root / name)
        numbers = AutoTokenizer.from_pretrained(workspace.root / name).get_vocab()
        united = scorer.sources.vocabulary.numbers  # pyright: ignore[reportAttributeAccessIssue]
        for weight in (EMBEDDINGS, HEAD):
            places = [united[token] for token in numbers]
            assert torch.equal(made[weight][places], own[weight][[*numbers.values()]])
        rest = [weight for weight in own if weight not in (EMBEDDINGS, HEAD)]
        assert_same_bits({weight: made[weight] for weight in rest}, {weight: own[weight] for weight in rest})


def test_a_run_goes_on_with_its_tokens_only(workspace: Workspace) -> None:
    assert workspace.llmevo("run", search_of(workspace, heldout=None), "--out", "run")[0] == 0
    status, printed = workspace.llmevo("resume", "run", "--budget", 8)
    assert status == 0, printed
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert status == 0, printed
    assert len(workspace.state("run").trials) == 8
    file = workspace.root / "two" / "tokenizer.json"
    file.write_text(file.read_text().replace('"<th>"', '"<thought>"'))
    config = workspace.root / "two" / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"<th>"', '"<thought>"'))
    status, printed = workspace.llmevo("resume", "run", "--budget", 9)
    assert (status, "questions.search" in printed) == (2, True), printed
    status, printed = workspace.llmevo("export", "run", "out")
    assert (status, "sources.base.vocabulary" in printed) == (2, True), printed
    status, printed = workspace.llmevo("export", "run", "out", "--force")
    assert "`base` had changed" in (workspace.root / "out" / "README.md").read_text(), printed
    shutil.rmtree(workspace.root / "one")  # a replay needs no models
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert status == 0, printed


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_an_adapter_on_the_head_is_merged_by_token(method: str, root: Path, tmp_path: Path) -> None:
    new_adapter(root / "lora", root / "two", target_modules=["q_proj", "lm_head"])
    factors = {name: weight for name, weight in weights_of(root / "lora").items() if "base_layer" not in name}
    save_file(factors, root / "lora" / "adapter_model.safetensors", {"format": "pt"})  # PEFT adds the whole head
    whole = {name: tensor.contiguous() for name, tensor in merged_by_peft(root / "two", root / "lora").items()}
    shutil.copytree(root / "two", root / "three")
    save_file(whole, root / "three" / "model.safetensors", {"format": "pt"})
    made: list[dict[str, Tensor]] = []
    for place, name in enumerate(("two+lora", "three")):
        recipe = recipe_of(method)
        recipe["models"][1]["model"] = name
        made.append(merged(recipe, root, tmp_path / str(place)))
    assert_near(*made, rtol=1e-4, atol=1e-6)
    expected = whole[HEAD][BASE] if method == "ties" else made[0][HEAD][BASE + 2]
    torch.testing.assert_close(made[0][HEAD][BASE + 2], expected)


def test_adapters_that_leave_the_embeddings_alone_share_their_models_table(root: Path) -> None:
    new_adapter(root / "lora", root / "two")
    names = ("base", "one", "two", "two+lora", "lora")
    models = [{"model": name, "parameters": {"weight": 1.0}} for name in names]
    recipe = Recipe.model_validate({"merge_method": "linear", "models": models, "tokenizer_source": "union"})
    sources = open_models(recipe, root)
    two, *adapted = (sources[ModelReference.parse(name)].tensor(EMBEDDINGS) for name in names[2:])
    assert all(two.data_ptr() == each.data_ptr() for each in adapted)
    assert isinstance(sources, ByToken)


def test_tokens_that_an_adapter_alone_has_added_are_in_the_union(tmp_path: Path) -> None:
    base, adapter = save(tmp_path / "base", 0), tmp_path / "adapter"
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([START, END])  # pyright: ignore[reportArgumentType]
    tokenizer.save_pretrained(adapter)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False
    )
    quietly(lambda: get_peft_model(model, lora).save_pretrained(str(adapter), save_embedding_layers=False))
    made: list[dict[str, Tensor]] = []
    for place, name in enumerate(("base+adapter", "adapter")):
        models = [{"model": of, "parameters": {"weight": 0.5}} for of in ("base", name)]
        recipe = {"merge_method": "linear", "base_model": "base", "models": models, "tokenizer_source": "union"}
        made.append(merged(recipe, tmp_path, tmp_path / str(place)))
        assert AutoTokenizer.from_pretrained(tmp_path / str(place)).get_vocab()["<|im_end|>"] == BASE + 1
    assert len(made[0][EMBEDDINGS]) == BASE + 2
    assert_same_bits(*made)


def test_adapters_with_the_same_new_tokens_make_a_model_that_loads(tmp_path: Path) -> None:
    base, tokenizer = save(tmp_path / "base", 0), tiny_tokenizer()
    tokenizer.add_tokens([START, END])  # pyright: ignore[reportArgumentType]
    for name in ("first", "second"):
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        lora = LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False
        )
        quietly(
            lambda made=model, to=str(tmp_path / name), config=lora: get_peft_model(made, config).save_pretrained(to)
        )
        tokenizer.save_pretrained(tmp_path / name)
    models = [{"model": f"base+{name}", "parameters": {"weight": 0.5}} for name in ("first", "second")]
    for place, source in enumerate((None, "union", "base+first")):
        recipe = {"merge_method": "linear", "models": models, **({"tokenizer_source": source} if source else {})}
        weights = merged(recipe, tmp_path, tmp_path / str(place))
        assert len(weights[EMBEDDINGS]) == BASE + 2
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / str(place))
        assert loaded.config.vocab_size == BASE + 2
        assert AutoTokenizer.from_pretrained(tmp_path / str(place)).get_vocab()["<|im_end|>"] == BASE + 1


def test_the_tokenizer_beside_an_adapter_is_the_models(root: Path, tmp_path: Path) -> None:
    new_adapter(root / "lora", root / "two")
    recipe = {"merge_method": "linear", "models": [{"model": "two+lora", "parameters": {"weight": 1.0}}]}
    tokenizer: Any = AutoTokenizer.from_pretrained(root / "two")
    tokenizer.chat_template = "{{ messages }} of the adapter"
    tokenizer.save_pretrained(root / "lora")
    for place, keys in enumerate(({}, {"chat_template": "auto"}, {"tokenizer_source": "two+lora"})):
        merged({**recipe, **keys}, root, tmp_path / str(place))
        made: Any = AutoTokenizer.from_pretrained(tmp_path / str(place))
        assert made.chat_template == tokenizer.chat_template
    tokenizer.add_tokens(["<more>"])  # of which the model has no row
    tokenizer.save_pretrained(root / "lora")
    merged(recipe, root, tmp_path / "without")
    assert "<more>" not in AutoTokenizer.from_pretrained(tmp_path / "without").get_vocab()


def test_a_token_that_only_the_tokenizers_config_names_keeps_its_row(tmp_path: Path) -> None:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("base", "one")]
    for seed, name in enumerate(("base", "one")):
        tiny_llama(seed, vocab_size=BASE + 5).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        file = tmp_path / name / "tokenizer_config.json"
        given = {key: of for key, of in json.loads(file.read_text()).items() if key != "added_tokens_decoder"}
        file.write_text(json.dumps({**given, "pad_token": "[PAD]"}))
    weights = merged(
        {"merge_method": "linear", "models": models, "tokenizer_source": "base"}, tmp_path, tmp_path / "out"
    )
    loaded: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.pad_token_id, len(weights[EMBEDDINGS])) == (BASE, BASE + 1)


@pytest.mark.vllm
def test_vllm_runs_the_union_without_the_folder_that_it_began_with(workspace: Workspace) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 160, "initializer_range": 0.15, "max_position_embeddings": 256}
    config = search_of(workspace, engine={"backend": "vllm"}, genome={"dtype": "bfloat16"}, shape=shape)
    scorer = Scorer(read_config(config), workspace.root)
    engine: Any = scorer.engine  # compared with an exported merge
    recipe, out = scorer.space.alone(ModelReference.parse("two")), workspace.root / "out"
    engine.swap(recipe)
    write_model(recipe, scorer.sources, out, 0)
    assert engine.differences(out) == []
    asked = [Instance("loglikelihood", {}, ("a<th>b", "<|im_start|>hello"), 0)]
    reference = HfEngine(out, out, "bfloat16", "cpu")
    (mine, _), (wanted, _) = engine.lm.loglikelihood(asked)[0], reference.lm.loglikelihood(asked)[0]
    assert mine == pytest.approx(wanted, abs=0.3)
    written = Instance("generate_until", {}, ("a<th>b", {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}), 0)
    assert isinstance(engine.lm.generate_until([written])[0], str)
    engine.close()


# --- mistakes ---------------------------------------------------------------------------------------------------


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def same_number(root: Path) -> None:
    edit(root / "one" / "tokenizer.json", lambda content: content["model"]["vocab"].update(b=70))


def other_base(root: Path) -> None:
    file = root / "one" / "tokenizer.json"
    edit(file, lambda content: content["model"]["vocab"].update(ab=content["model"]["vocab"].pop("~")))


def fewer_rows(root: Path) -> None:
    tiny_llama(1, vocab_size=BASE + 1).save_pretrained(root / "one")


def without_tokenizer(root: Path) -> None:
    for file in (root / "one").glob("*token*"):
        file.unlink()


def damaged(root: Path) -> None:
    file = root / "one" / "tokenizer.json"
    file.write_text(file.read_text()[:1000])


def beyond(root: Path) -> None:
    edit(root / "base" / "tokenizer.json", lambda content: content["model"]["vocab"].update({"~": 3000}))


def other_text(root: Path) -> None:
    save(root / "one", 1, (AddedToken("<a_b>", special=True, normalized=False),))
    spaces = {"type": "Replace", "pattern": {"String": "_"}, "content": " "}
    edit(root / "base" / "tokenizer.json", lambda content: content.update(decoder=spaces))


def another_table(root: Path) -> None:
    for name in TOKENS:
        weights = weights_of(root / name)
        extra = {**weights, "model.embed_tokens_per_layer.weight": weights[EMBEDDINGS][:50].clone()}
        save_file(extra, root / name / "model.safetensors", {"format": "pt"})


def model_token(**keys: Any) -> dict[str, Any]:
    return {"tokens": {"<|x|>": {"source": {"kind": "model_token", **keys}}}}


MISTAKES: Mapping[str, tuple[Callable[[Path], None] | None, dict[str, Any], str]] = {
    "two tokens of one number": (
        same_number,
        {},
        "one: the tokens .* of its tokenizer have the same number",
    ),
    "another base": (other_base, {}, "one and base have different vocabularies: 1 token that the tokenizer of one was"),
    "fewer rows": (
        fewer_rows,
        {},
        "one has the token '<|im_end|>' as number 101, and lm_head.weight has only 101",
    ),
    "no tokenizer": (
        without_tokenizer,
        {},
        "one has no tokenizer .*, so it is unknown which tokens its 102 rows are of",
    ),
    "damaged JSON": (damaged, {}, "one/tokenizer.json is not valid JSON"),
    "numbers beyond the rows": (beyond, {}, "base has the token '~' as number 3000, and lm_head.weight has only 104"),
    "a special token that changes": (other_text, {}, "the special token '<a_b>' .* its text '<a b>' is read as"),
    "another table": (another_table, {}, "model.embed_tokens_per_layer.weight .* has a row for each token as well"),
    "a token of no model": (None, {"tokens": {"<|x|>": {}}}, "no model of the merge has the token '<|x|>'; give it a"),
    "a source of no merge": (None, {"tokens": {"a": {"source": "four", "force": True}}}, "'a': its source four is no"),
    "a token of another model": (None, model_token(model="one", token="<th>"), "one does not have the token '<th>'"),
    "a row of no table": (None, model_token(model="one", token_id=500), "one has 102 rows, none of them token_id 500"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_in_one_line(mistake: str, root: Path, tmp_path: Path) -> None:
    broken, options, said = MISTAKES[mistake]
    if broken:
        broken(root)
    recipe = {**recipe_of(), "tokenizer": {"source": "union", **options}}
    del recipe["tokenizer_source"]
    with pytest.raises(SourceError, match=said.replace("|", r"\|")) as caught:
        merged(recipe, root, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # and the way out
    assert not (tmp_path / "out").exists()


def test_a_merge_method_for_pairs_of_many_models_is_refused(workspace: Workspace) -> None:
    config = search_of(workspace, method="slerp", genome={"models": ["base", "one", "two"]})
    status, printed = workspace.llmevo("inspect", config)
    assert status == 2
    assert "genome.tokenizer_source: the models' tokens differ, and slerp merges only two of the 3 models" in printed


def test_numbers_of_no_token_keep_the_donors_rows(tmp_path: Path) -> None:
    """As in tokenizers whose special tokens stand far behind the others."""
    save(tmp_path / "base", 0, (END,), padding=5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / "base" / name
        file.write_text(file.read_text().replace(f'"id": {BASE}', f'"id": {BASE + 3}'))
    edit(
        tmp_path / "base" / "tokenizer.json", lambda content: content["model"]["vocab"].update({"<|im_end|>": BASE + 3})
    )
    save(tmp_path / "one", 1, (START, END))
    mine = merged(recipe_of("task_arithmetic", ("one",)), tmp_path, tmp_path / "out")
    base = weights_of(tmp_path / "base")
    found = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert (found["<|im_end|>"], found["<|im_start|>"]) == (BASE + 3, BASE + 4)
    assert len(mine[EMBEDDINGS]) == BASE + 5
    assert torch.equal(mine[EMBEDDINGS][BASE : BASE + 3], base[EMBEDDINGS][BASE : BASE + 3])
