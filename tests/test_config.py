"""Configs: those of mergekit-evolve and LLM-Evo-Merge run unchanged, and mistakes are named with the way out."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmevo.config import (
    FORMATS,
    REMOVED,
    REMOVED_VALUES,
    Config,
    config_text,
    parse_changes,
    parse_config,
    parse_logged,
    parse_workers,
    read_config,
    without_removed,
)
from llmevo.errors import ConfigError, UserError
from llmevo.merging.recipe import Recipe
from llmevo.models import quantize
from llmevo.models.references import ModelReference

MERGEKIT_EVOLVE = """
genome:
    models:
       - model_1
       - model_2
       - model_n
    merge_method: dare_ties
    base_model: base_model_if_needed
    tokenizer_source: null # optional
    layer_granularity: 8

    # optional:
    normalize: false
    allow_negative_weights: false
    smooth: false
    filters:
      - self_attn
      - mlp
tasks:
  - name: lm_eval_task_name
    weight: 1.0 # optional
    metric: "acc,none" # defaults to acc,none
  - name: another
"""
"""The example of mergekit's docs/evolve.md; LLM-Evo-Merge's README has the same one."""

LLM_EVO_MERGE = """
genome:
  models:
    - NCSOFT/Llama-VARCO-8B-Instruct
    - akjindal53244/Llama-3.1-Storm-8B
  merge_method: task_arithmetic
  base_model: meta-llama/Llama-3.1-8B
  tokenizer_source: base
  layer_granularity: 2
  allow_negative_weights: true
  smooth: true
tasks:
  - kobest_copa
  - name: word_perplexity_task
    weight: -0.2
    metric: word_perplexity,none
limit: 100
num_fewshot: 5
shuffle: true
random_init: true
apply_chat_template: false
fewshot_as_multiturn: false
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "config.yml"
    file.write_text(text, encoding="utf-8")
    return file


def plain(**changes: Any) -> dict[str, Any]:
    genome = {"models": ["a", "b"], "merge_method": "ties", "base_model": "base"}
    return {"genome": genome, "tasks": ["sums"], **changes}


def message_of(raw: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, "my.yml")
    return str(caught.value)


def test_the_documented_config_of_mergekit_evolve_is_a_config(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, MERGEKIT_EVOLVE))
    genome = config.genome
    assert [str(model) for model in genome.models] == ["model_1", "model_2", "model_n"]
    assert (genome.merge_method, str(genome.base_model)) == ("dare_ties", "base_model_if_needed")
    assert (genome.tokenizer_source, genome.layer_granularity) == (None, 8)
    assert (genome.normalize, genome.allow_negative_weights, genome.smooth) == (False, False, False)
    assert genome.filters == ["self_attn", "mlp"]
    assert config.counted == {"lm_eval_task_name": (1.0, "acc,none"), "another": (1.0, "acc,none")}
    assert config.search.optimizer == "llm"


def test_a_config_of_llm_evo_merge_is_a_config(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, LLM_EVO_MERGE))
    assert config.genome.tokenizer_source == "base"
    assert config.genome.smooth
    assert config.genome.allow_negative_weights
    assert config.counted == {"kobest_copa": (1.0, "acc,none"), "word_perplexity_task": (-0.2, "word_perplexity,none")}
    assert (config.asking.limit, config.asking.num_fewshot, config.asking.shuffle) == (100, 5, True)
    assert config.random_init
    assert (config.asking.apply_chat_template, config.asking.fewshot_as_multiturn) == (False, False)


def test_what_those_configs_leave_out_has_the_defaults_of_their_tools() -> None:
    config = parse_config(plain(), "my.yml")
    assert (config.limit, config.num_fewshot, config.shuffle, config.random_init) == (None, None, False, False)
    assert (config.apply_chat_template, config.fewshot_as_multiturn) == (True, True)
    genome = config.genome
    assert (genome.normalize, genome.layer_granularity, genome.filters, genome.smooth) == (None, 0, None, False)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "task_arithmetic", "slerp"])
def test_every_method_of_mergekit_evolve_is_known(method: str) -> None:
    assert (
        parse_config(plain(genome={**plain()["genome"], "merge_method": method}), "my.yml").genome.merge_method
        == method
    )


def test_filters_are_a_list_of_parts_of_tensor_names() -> None:
    genome = plain()["genome"]
    assert parse_config(plain(genome={**genome, "filters": ["self_attn"]}), "").genome.filters == ["self_attn"]
    assert "genome.filters" in message_of(plain(genome={**genome, "filters": "self_attn"}))


def test_held_out_tasks_are_written_like_tasks_and_asked_in_full() -> None:
    config = parse_config(plain(heldout=["later", {"name": "last", "weight": 2}], limit=3, num_fewshot=1), "my.yml")
    assert [(task.name, task.weight) for task in config.heldout] == [("later", 1.0), ("last", 2.0)]
    assert (config.heldout_asking.limit, config.heldout_asking.num_fewshot) == (None, 1)


def test_the_seed_of_the_search_orders_the_questions_too() -> None:
    assert parse_config(plain(search={"seed": 7}, shuffle=True), "my.yml").asking.seed == 7


UNKNOWN = {
    "taks": plain(taks=["sums"]),
    "genome.modls": plain(genome={**plain()["genome"], "modls": []}),
    "search.buget": plain(search={"buget": 3}),
    "llm.modell": plain(llm={"modell": "gpt-4o"}),
    "llm.price.promt": plain(llm={"price": {"promt": 1}}),
    "engine.divice": plain(engine={"divice": "cpu"}),
    "tasks.1.wieght": plain(tasks=["sums", {"name": "dates", "wieght": 1}]),
    "heldout.0.metrik": plain(heldout=[{"name": "dates", "metrik": "acc"}]),
}
NEAREST = ("tasks", "models", "budget", "model", "prompt", "device", "weight", "metric")


@pytest.mark.parametrize(("key", "nearest"), [*zip(UNKNOWN, NEAREST, strict=True)])
def test_an_unknown_key_suggests_the_nearest_known_one(key: str, nearest: str) -> None:
    message = message_of(UNKNOWN[key])
    assert f"{key}: there is no such key, did you mean '{nearest}'?" in message
    assert message.startswith("my.yml: ")


PEERS = {
    "popsize": (plain(popsize=8), "search.population"),
    "max_fevals": (plain(max_fevals=100), "search.budget"),
    "search.sigma0": (plain(search={"sigma0": 0.2}), "step size"),
    "search.popsize": (plain(search={"popsize": 8}), "search.population"),
    "vllm": (plain(vllm=True), "`engine: {backend: vllm}`"),
    "num_gpus": (plain(num_gpus=8), "engine.workers"),
    "llm.max_retries": (plain(llm={"max_retries": 3}), "llm.retries"),
}


@pytest.mark.parametrize("key", PEERS)
def test_a_key_of_another_tool_is_told_with_the_name_it_has_here(key: str) -> None:
    raw, says = PEERS[key]
    message = message_of(raw)
    assert f"{key}: there is no such key; " in message
    assert says in message


def test_a_key_in_a_wrong_section_is_told_with_its_place() -> None:
    assert "budget: there is no such key; use search.budget" in message_of(plain(budget=10))
    assert "engine.seed: there is no such key; use search.seed" in message_of(plain(engine={"seed": 1}))
    assert "'limit' belongs at the top" in message_of(plain(search={"limit": 10}))


def test_a_word_is_suggested_only_where_it_is_near() -> None:
    assert "did you mean" not in message_of(plain(search={"popsise": 4}))


def test_an_unknown_key_like_none_lists_the_known_ones() -> None:
    message = message_of(plain(engine={"colour": "red"}))
    assert "known: " in message
    assert "device" in message


WRONG = {
    "limit": plain(limit="many"),
    "limit ": plain(limit=0),
    "num_fewshot": plain(num_fewshot=-1),
    "shuffle": plain(shuffle="perhaps"),
    "search.budget": plain(search={"budget": "big"}),
    "search.population": plain(search={"population": 1}),
    "llm.timeout": plain(llm={"timeout": 0}),
    "engine.backend": plain(engine={"backend": "jax"}),
    "engine.gpus_per_worker": plain(engine={"gpus_per_worker": 0}),
    "tasks.0.weight": plain(tasks=[{"name": "sums", "weight": "heavy"}]),
    "tasks.0.weight ": plain(tasks=[{"name": "sums", "weight": float("nan")}]),
    "llm.temperature": plain(llm={"temperature": float("inf")}),
    "genome.bounds.weight.1": plain(genome={**plain()["genome"], "bounds": {"weight": [0, float("inf")]}}),
    "genome.layer_granularity": plain(genome={**plain()["genome"], "layer_granularity": "eight"}),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_value_of_the_wrong_kind_is_named_with_its_key(key: str) -> None:
    message = message_of(WRONG[key])
    assert f"my.yml: {key.strip()}: " in message
    value: Any = WRONG[key]
    for part in key.strip().split("."):
        value = value[int(part)] if part.isdigit() else value[part]
    assert f"(it is {value!r})" in message or (isinstance(value, str) and message.count(repr(value)) == 1)


CHOICES = {
    "linaer": (plain(genome={**plain()["genome"], "merge_method": "linaer"}), "'linear'"),
    "randon": (plain(search={"optimizer": "randon"}), "'random'"),
    "openia": (plain(llm={"proposer": "openia"}), "'openai'"),
    "bfloat61": (plain(genome={**plain()["genome"], "dtype": "bfloat61"}), "'bfloat16'"),
}


@pytest.mark.parametrize("word", CHOICES)
def test_an_unknown_method_optimizer_proposer_or_type_suggests_the_nearest(word: str) -> None:
    raw, hint = CHOICES[word]
    message = message_of(raw)
    assert f"{word!r} is unknown" in message
    assert f"did you mean {hint}" in message


QUANTIZE: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt format": (plain(engine={"quantize": "q8"}), "'q8' is no known format; give q8_0, q4_0 or fp8"),
    "capitals": (plain(engine={"quantize": "FP8"}), "'FP8' is no known format; give q8_0, q4_0 or fp8"),
    "a K-quant": (plain(engine={"quantize": "q4_k_m"}), "'q4_k_m' cannot be rounded to here, q4_0 comes nearest"),
    "a fine K-quant": (plain(engine={"quantize": "Q6_K"}), "'Q6_K' cannot be rounded to here, q8_0 comes nearest"),
    "a number": (plain(engine={"quantize": 4}), "4 is no known format; give q8_0, q4_0 or fp8, or leave it out"),
    "a switch": (plain(engine={"quantize": True}), "True is no known format"),
    "a list": (plain(engine={"quantize": ["q8_0", "q4_0"]}), "is no known format; give q8_0, q4_0 or fp8"),
    "a misspelt stage": (
        plain(engine={"quantize": "q8_0", "quantize_at": "finalist"}),
        "engine.quantize_at: Input should be 'finalists' or 'all' (it is 'finalist')",
    ),
    "a stage without a format": (plain(engine={"quantize_at": "all"}), "add `quantize: q4_0` (or q8_0, fp8)"),
    "no finalists": (
        plain(engine={"quantize": "fp8"}, search={"finalists": 0}),
        "engine.quantize: fp8 is for finalists, and search.finalists is 0",
    ),
    "votes": (
        plain(engine={"quantize": "fp8"}, tasks=[{"name": "taste", "votes": {"pairs": 2}, "prompts": "prompts.txt"}]),
        "engine.quantize: a person would vote on taste for every finalist once more",
    ),
}


@pytest.mark.parametrize("what", QUANTIZE)
def test_a_wrong_format_is_told_in_one_line_with_the_known_ones(what: str) -> None:
    raw, says = QUANTIZE[what]
    message = message_of(raw)
    assert says in message
    assert len(message.splitlines()) == 1


def test_the_formats_are_those_that_weights_are_rounded_to() -> None:
    assert FORMATS == quantize.FORMATS
    engine = parse_config(plain(engine={"quantize": "q8_0"}), "my.yml").engine
    assert (engine.search_format, engine.finals_format) == ("", "q8_0")
    engine = parse_config(plain(engine={"quantize": "q8_0", "quantize_at": "all"}), "my.yml").engine
    assert (engine.search_format, engine.finals_format) == ("q8_0", "")
    engine = parse_config(plain(), "my.yml").engine
    assert (engine.search_format, engine.finals_format) == ("", "")


@pytest.mark.parametrize("key", ["genome", "tasks"])
def test_a_missing_section_is_named(key: str) -> None:
    raw = plain()
    del raw[key]
    assert message_of(raw) == f"my.yml: {key}: this key is missing"


def test_a_missing_base_model_is_named_with_the_reason() -> None:
    message = message_of(plain(genome={"models": ["a", "b"], "merge_method": "dare_ties"}))
    assert "base_model is missing" in message
    assert "genome" in message


@pytest.mark.parametrize("key", ["tasks", "models"])
def test_an_empty_list_of_tasks_or_models_is_refused(key: str) -> None:
    raw = plain(tasks=[]) if key == "tasks" else plain(genome={**plain()["genome"], "models": []})
    assert f"{key}: " in message_of(raw)


def test_several_mistakes_are_told_at_once() -> None:
    message = message_of(plain(limit="many", shufle=True, search={"budget": 0}))
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize("raw", [None, [], "text", 3, [{"genome": 1}]])
def test_a_config_that_is_no_mapping_is_refused(raw: Any) -> None:
    assert "mapping" in message_of(raw)


@pytest.mark.parametrize("raw", [plain(genome=None), plain(tasks="sums"), plain(search=5), {**plain(), 1: 2}])
def test_a_section_of_the_wrong_kind_is_refused(raw: Any) -> None:
    assert message_of(raw).startswith("my.yml: ")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (plain(genome=[1]), "genome: give a mapping with keys such as `models` (it is [1])"),
        (plain(tasks=[[1]]), "tasks.0: give a mapping with keys such as `name` (it is [1])"),
        (plain(tasks=1), "tasks: give a list (it is 1)"),
        (plain(engine={"options": 3}), "engine.options: give a mapping (it is 3)"),
        (None, "it is empty; a config is a mapping with `genome:` and `tasks:`"),
        ([1], "it is [1]; a config is a mapping with `genome:` and `tasks:`"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_in_the_words_of_a_config(raw: Any, says: str) -> None:
    assert message_of(raw) == f"my.yml: {says}"


@pytest.mark.parametrize("given", [1, [1], [0, 1, 2]])
def test_bounds_that_are_no_pair_are_told_as_one(given: Any) -> None:
    message = message_of(plain(genome={**plain()["genome"], "bounds": {"weight": given}}))
    assert message == f"my.yml: genome.bounds.weight: give [low, high], such as [0, 1] (it is {given})"


def test_a_recipe_instead_of_a_config_is_told_as_such() -> None:
    message = message_of({"merge_method": "linear", "models": [{"model": "a"}], "dtype": "float32"})
    assert message.startswith("my.yml: this is a recipe, not the config of a search; merge it with `llmevo merge`")
    assert len(message.splitlines()) == 1


def test_the_beginning_of_a_few_methods_suggests_all_of_them() -> None:
    message = message_of(plain(genome={**plain()["genome"], "merge_method": "dare"}))
    assert message.endswith("merge_method 'dare' is unknown, did you mean 'dare_linear' or 'dare_ties'?")


@pytest.mark.parametrize("text", ["genome: [", "a: b: c", "\tgenome: 1", "a: \x01"])
def test_a_file_that_is_no_yaml_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yml: it is not YAML"):
        read_config(write(tmp_path, text))


BOMB = "a: &a [0,0,0,0,0,0,0,0,0,0]\n" + "".join(
    f"{name}: &{name} [{','.join(10 * [f'*{before}'])}]\n" for before, name in pairwise("abcdefgh")
)
"""A few lines that stand for a hundred million numbers."""


@pytest.mark.parametrize("read", [read_config, lambda file: Recipe.from_yaml(file.read_text(), str(file))])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("genome:\n  models: [a]\n  dtype: float16\n  models: [b]", "line 4: the key 'models' is given twice.* line 2"),
        ("tasks: [a]\n\ntasks: [b]", "line 3: the key 'tasks' is given twice.* line 1"),
        ("search: {seed: 1, seed: 2}", "line 1: the key 'seed' is given twice.* line 1"),
        (BOMB, "line .: with its aliases this is more than 100,000 values"),
        ("a: &a [*a]", "line 1: a value contains itself"),
        ("[" * 5000, "nested too deeply"),
        ("merge_method: " + "x" * 100_000 + "\ngenome: 1\ntasks: " + "x" * 100_000, ""),
        ("merge_method: linear\nmodels: [" + "x, " * 90_000 + "]", ""),
        ("a: 1\nlimit: 2020-13-45", "line 2: '2020-13-45' looks like a date and is none .*write it in quotes"),
        ("limit: " + "1" * 5000, "line 1: '1{40}' looks like a number and is none .*write it in quotes"),
    ],
    ids=[
        "a key",
        "a section",
        "in a line",
        "aliases",
        "endless",
        "deep",
        "a long text",
        "a long list",
        "a date",
        "digits",
    ],
)
def test_what_is_hardly_meant_is_refused_in_a_few_lines(
    tmp_path: Path, read: Callable[[Path], object], text: str, says: str
) -> None:
    with pytest.raises(UserError, match=rf"(?s)config\.yml: .*({says})") as caught:
        read(write(tmp_path, text))
    assert len(str(caught.value)) < 2500


def test_an_alias_is_read_as_what_it_stands_for(tmp_path: Path) -> None:
    text = MERGEKIT_EVOLVE + "\nx: &search {budget: 40}\nsearch: {<<: *search, seed: 3}\n"
    with pytest.raises(ConfigError, match="there is no such key"):
        read_config(write(tmp_path, text))
    config = read_config(write(tmp_path, MERGEKIT_EVOLVE + "\nsearch: {<<: {budget: 40}, budget: 9}\n"))
    assert config.search.budget.evaluations == 9


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"away\.yml: there is no such file"):
        read_config(tmp_path / "away.yml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path)
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "binary.yml")


def test_an_override_takes_the_place_of_a_key_and_leaves_its_neighbours(tmp_path: Path) -> None:
    file = write(tmp_path, MERGEKIT_EVOLVE + "\nsearch: {budget: 40, seed: 3}\n")
    config = read_config(file, {"search.budget": 9, "llm.model": "gpt-x"})
    assert (config.search.budget.evaluations, config.search.seed, config.llm.model) == (9, 3, "gpt-x")


def test_an_override_is_checked_like_the_file() -> None:
    with pytest.raises(ConfigError, match=r"search\.optimizer|optimizer 'magic'"):
        parse_config(plain(), "my.yml", {"search.optimizer": "magic"})
    with pytest.raises(ConfigError, match="search"):
        parse_config(plain(search=5), "my.yml", {"search.budget": 9})


def test_changes_of_the_command_line_reach_every_key(tmp_path: Path) -> None:
    file = write(tmp_path, MERGEKIT_EVOLVE + "\nsearch: {budget: 40, racing: true}\n")
    changes = ["search.racing.looks=3", "search.budget={minutes: 5}", "genome.models.0=other/model", "limit=7"]
    config = read_config(file, parse_changes(changes))
    assert config.search.racing is not None
    assert config.search.racing.looks == 3
    assert (config.search.budget.minutes, config.limit) == (5, 7)
    assert str(config.genome.models[0]) == "other/model"
    assert config_text(file) == file.read_text()
    assert parse_config(yaml.safe_load(config_text(file, parse_changes(changes))), "") == config


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("search.budget", "--set: 'search.budget' is no KEY=VALUE; write for example `--set search.budget=50`"),
        ("=5", "--set: '=5' is no KEY=VALUE"),
        ("search..budget=5", "is no KEY=VALUE"),
        ("search.budget=[", "--set search.budget: it is not YAML"),
        ("search.budget.minutes=5", "search.budget.minutes: search.budget is 40, which has no keys; set search.budget"),
        ("genome.models.9=a/b", "genome.models.9: there is no entry '9' in a list of"),
        ("genome.models.first=a/b", "genome.models.first: there is no entry 'first' in a list of"),
        ("search.bugdet=5", "search.bugdet: there is no such key, did you mean 'budget'?"),
    ],
)
def test_a_change_that_leads_nowhere_is_refused(tmp_path: Path, change: str, reason: str) -> None:
    file = write(tmp_path, MERGEKIT_EVOLVE + "\nsearch: {budget: 40}\n")
    with pytest.raises(ConfigError) as caught:
        read_config(file, parse_changes([change]))
    assert reason in str(caught.value)


def test_a_config_comes_back_from_its_plain_values() -> None:
    config = parse_config(plain(genome={**plain()["genome"], "models": ["a@v1+lora", "b"]}), "my.yml")
    assert config.genome.models[0] == ModelReference.parse("a@v1+lora")
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_an_evaluation_seed_takes_questions_and_masks_out_of_the_hands_of_the_seed() -> None:
    both = parse_config(plain(search={"seed": 4, "evaluation_seed": 1}, shuffle=True), "my.yml")
    assert (both.evaluation_seed, both.asking.seed, both.heldout_asking.seed) == (1, 1, 1)
    one = parse_config(plain(search={"seed": 4}), "my.yml")
    assert (one.evaluation_seed, one.asking.seed) == (4, 4)


def test_own_recipes_to_start_from_are_files_or_genes() -> None:
    search = parse_config(plain(search={"start_from": ["mine.yml", {"a/all/weight": 0.5}]}), "my.yml").search
    assert search.start_from == [Path("mine.yml"), {"a/all/weight": 0.5}]


def test_a_cap_on_the_cost_needs_prices() -> None:
    assert "price" in message_of(plain(llm={"max_cost": 1.0}))
    assert parse_config(plain(llm={"max_cost": 1.0, "price": {"completion": 10}}), "my.yml").llm.max_cost == 1.0


@pytest.mark.parametrize("place", REMOVED)
def test_a_removed_key_is_refused_with_what_to_do_instead_and_dropped_from_old_logs(place: str) -> None:
    given: Any = "together"
    for key in reversed(place.split(".")):
        given = {key: given}
    config = {"genome": {"models": ["a", "b"], "merge_method": "linear"}, "tasks": ["t"]}
    with pytest.raises(ConfigError, match=f"{place}: this key was removed; .+"):
        parse_config({**config, **given}, "config.yml")
    head = place.partition(".")[0]
    assert not without_removed({**config, **given})[head].get(place.partition(".")[2].split(".")[-1])
    parse_logged({**config, **given}, "the log")


@pytest.mark.parametrize(("place", "value"), [(key, value) for key, ways in REMOVED_VALUES.items() for value in ways])
def test_a_removed_value_is_refused_with_what_to_use_instead_and_read_from_old_logs(place: str, value: str) -> None:
    section, _, key = place.partition(".")
    config = plain(**{section: {key: value}})
    assert f"{place}: {value!r} was removed; use " in message_of(config)
    assert getattr(parse_logged(config, "the log").search, key) == value
    with pytest.raises(ConfigError, match="is unknown"):
        parse_logged(plain(**{section: {key: "no such value"}}), "the log")


@pytest.mark.parametrize("engine", [{"workers": 2}, {"workers": {"min": 1, "max": 4}, "on": "ray"}])
def test_one_gpu_for_several_workers_is_refused_with_the_way_out(engine: dict[str, Any]) -> None:
    message = message_of(plain(engine={"device": "cuda:1", **engine}))
    assert "engine: device 'cuda:1' is one GPU" in message
    assert "CUDA_VISIBLE_DEVICES" in message


@pytest.mark.parametrize(
    ("engine", "most"),
    [
        ({"device": "cuda:1"}, 1),
        ({"device": "cuda:1", "workers": 1}, 1),
        ({"device": "cpu"}, 1),
        ({"device": "cpu", "workers": 4}, 4),
        ({"device": "cuda", "workers": 4}, 4),
        ({"device": "cuda"}, None),
        ({"workers": {"max": 8}, "on": "ray"}, 8),
        ({}, None),
    ],
)
def test_a_chosen_device_has_one_worker_unless_a_number_is_given(engine: dict[str, Any], most: int | None) -> None:
    assert parse_config(plain(engine=engine), "my.yml").engine.most_workers == most


@pytest.mark.parametrize("text", ["0", "-1", "many", "2.5", "1e3", ""])
def test_a_number_of_workers_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--workers: give a number of 1 or more, or auto"):
        parse_workers(text)


def test_a_number_of_workers_or_auto_is_read() -> None:
    assert [parse_workers(text) for text in ("8", "auto", None)] == [8, "auto", None]


WORKERS = {
    "workers with {min, max} need `on: ray`": {"workers": {"min": 1, "max": 4}},
    "address is for `on: ray` only": {"workers": 2, "address": "auto"},
    "give the number of `workers` on the cluster": {"on": "ray", "address": "auto"},
    "engine.address: give `auto`, `none` or an address such as": {"on": "ray", "workers": 2, "address": "head"},
    "min (4) is more than max (2)": {"on": "ray", "workers": {"min": 4, "max": 2}},
    "engine.gpus_per_worker: give a whole number, or a share below 1": {"gpus_per_worker": 1.5},
    "gpus_per_worker 1 is less than the 4 GPUs that `options` spread vLLM over": {
        "gpus_per_worker": 1,
        "options": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    },
}


@pytest.mark.parametrize("says", WORKERS)
def test_workers_that_cannot_be(says: str) -> None:
    message = message_of(plain(engine=WORKERS[says]))
    assert message.startswith("my.yml: engine")
    assert says in message


@pytest.mark.parametrize("workers", [0, -2, "two", True, [2], {"min": 1}, {"max": "x"}, {"min": 0, "max": 2}])
def test_workers_that_are_no_number_are_told_in_one_line(workers: Any) -> None:
    message = message_of(plain(engine={"workers": workers, "on": "ray"}))
    wanted = "my.yml: engine.workers: give a number of 1 or more, `auto`, or with `on: ray` such as {min: 2, max: 32}"
    assert message.startswith(wanted)
    assert len(message.splitlines()) == 1


def test_a_misspelt_bound_of_workers_is_named() -> None:
    message = message_of(plain(engine={"workers": {"min": 1, "mx": 4}, "on": "ray"}))
    assert message == "my.yml: engine.workers: there is no key 'mx' in it, did you mean 'max'?"


@pytest.mark.parametrize("row", [3, [1], {"one/all/weight": [1]}])
def test_a_start_row_that_is_no_recipe_is_told_in_one_line(row: Any) -> None:
    message = message_of(plain(search={"start_from": [row]}))
    assert message.startswith(f"my.yml: search.start_from: {row!r} is no recipe; give a file, a mapping of genes, or")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "engine",
    [
        {"on": "ray"},
        {"on": "ray", "workers": {"max": 4}, "address": "auto"},
        {"on": "ray", "workers": 2, "address": "ray://head.example.org:10001", "gpus_per_worker": 0.5},
        {"on": "ray", "workers": 2, "address": "192.0.2.7:6379", "gpus_per_worker": 2},
    ],
)
def test_workers_on_ray(engine: Any) -> None:
    assert parse_config(plain(engine=engine), "my.yml").engine.on == "ray"


def test_a_worker_has_as_many_gpus_as_its_engine() -> None:
    for engine, gpus in (
        ({}, None),
        ({"options": {"tensor_parallel_size": 2}}, 2),
        ({"options": {"tensor_parallel_size": 2}, "gpus_per_worker": 4}, 4),
        ({"gpus_per_worker": 0.25}, 0.25),
    ):
        assert parse_config(plain(engine=engine), "my.yml").engine.gpus == gpus


def test_the_key_on_is_a_key(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text(f"{yaml.safe_dump(plain())}engine: {{on: ray, workers: 2, self_check: off}}\n")
    engine = read_config(file).engine
    assert (engine.on, engine.workers, engine.self_check) == ("ray", 2, False)
