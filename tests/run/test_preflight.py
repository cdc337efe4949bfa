"""Each check of the models, on models that really have the fault."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmevo.config import read_config
from llmevo.run import preflight
from llmevo.run.preflight.base import Finding
from llmevo.run.preflight.forecast import memory, memory_of
from llmevo.run.preflight.models import (
    adapters,
    dtypes,
    functions,
    licences,
    rope,
    rounded,
    rounding_loss,
    tied_heads,
    vectors,
)
from llmevo.run.preflight.preparation import preparation
from llmevo.run.preflight.questions import examples, heldout, nulls, questions, repetitions
from llmevo.run.preflight.tokenizers import chat_templates, special_tokens, system_messages, vocabularies
from llmevo.run.scorer import Scorer
from support.checkpoints import new_adapter
from support.tiny_model import tiny_llama, tiny_tokenizer
from support.workspace import Workspace

GENOME = {"base_model": "base", "models": ["one", "two"], "merge_method": "task_arithmetic", "dtype": "float32"}


def scorer(workspace: Workspace, **changes: Any) -> Scorer:
    return Scorer(read_config(workspace.config(**changes)), workspace.root)


def change(file: Path, **values: Any) -> None:
    """Replace keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def only(findings: Any) -> Finding:
    (finding,) = findings
    return finding


def card(folder: Path, licence: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")


def test_models_of_one_making_have_nothing_to_be_said_of_but_their_licence(workspace: Workspace) -> None:
    for name in ("base", "one", "two"):
        card(workspace.root / name, "mit")
    assert preflight.preflight(scorer(workspace)) == []


def test_a_search_without_held_out_questions_is_said_at_its_beginning(workspace: Workspace) -> None:
    assert [*heldout(scorer(workspace))] == []
    split = {"search": 0.5, "heldout": 0.5}
    assert [*heldout(scorer(workspace, heldout=None, split=split))] == []
    found = only(heldout(scorer(workspace, heldout=None)))
    assert "no questions are held out" in found.what
    assert str(found) in preflight.brief(scorer(workspace, heldout=None))


def test_tokens_with_other_numbers_are_named(workspace: Workspace) -> None:
    file = workspace.root / "two" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    found = only(vocabularies(scorer(workspace)))
    assert found.model == "two"
    assert "2 tokens differ from those of base" in found.what
    assert "'a'" in found.what
    assert "'b'" in found.what


def test_a_model_without_a_tokenizer_cannot_be_checked(workspace: Workspace) -> None:
    for file in (workspace.root / "one").glob("*token*"):
        file.unlink()
    assert "no tokenizer" in only(vocabularies(scorer(workspace))).what


def test_another_end_of_the_answer_is_named_with_both_values(workspace: Workspace) -> None:
    change(workspace.root / "two" / "tokenizer_config.json", eos_token="<pad>")
    change(workspace.root / "two" / "config.json", eos_token_id=1)
    found = only(special_tokens(scorer(workspace)))
    assert found.model == "two"
    assert "eos_token is '<pad>', that of base '</s>'" in found.what
    assert "eos_token_id is 1, that of base 3" in found.what
    assert "tokenizer_source" in found.remedy


def test_chat_templates_matter_only_where_they_are_applied(workspace: Workspace) -> None:
    (workspace.root / "two" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert not [*chat_templates(scorer(workspace, apply_chat_template=False))]
    found = only(chat_templates(scorer(workspace, apply_chat_template=True)))
    assert (found.model, "not that of base" in found.what) == ("two", True)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "there is no chat template"),
        ("{% for m in messages %}", "cannot be rendered (TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages[0].content.sing() }}", "cannot be rendered (UndefinedError: "),
        ("{{ 1 / 0 }}", "cannot be rendered (ZeroDivisionError: "),
    ],
)
@pytest.mark.parametrize("words", [("run", "--out", "run"), ("inspect",)])
def test_a_chat_template_that_cannot_be_rendered_ends_a_run_before_its_first_candidate(
    words: tuple[str, ...], template: str | None, said: str, workspace: Workspace
) -> None:
    file = workspace.root / "base" / "chat_template.jinja"
    change(workspace.root / "base" / "tokenizer_config.json", chat_template=None)
    file.unlink(missing_ok=True) if template is None else file.write_text(template)
    status, printed = workspace.llmevo(words[0], workspace.config(apply_chat_template=True), *words[1:])
    assert status == 2
    (line,) = printed.splitlines()
    assert "base: apply_chat_template is true, and " in line
    assert said in line
    assert "set apply_chat_template: false, or genome.tokenizer_source: a model that has a template (one, two)" in line
    assert not (workspace.root / "run").exists()
    status, printed = workspace.llmevo("run", workspace.config(apply_chat_template=False), "--dry-run")
    assert status == 0, printed


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
LEAVING_OUT = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [(REFUSING, "refuses a system message"), (LEAVING_OUT, "leaves system messages out")],
)
def test_a_chat_template_without_a_system_message_is_named_where_a_task_has_a_description(
    workspace: Workspace, template: str, said: str
) -> None:
    (workspace.root / "base" / "chat_template.jinja").write_text(template)
    assert not [*system_messages(scorer(workspace, apply_chat_template=True))]
    task = workspace.root / "tasks" / "letters.yaml"
    task.write_text(task.read_text() + "description: Name the next letter.\n")
    found = only(system_messages(scorer(workspace, apply_chat_template=True)))
    assert said in found.what
    assert "description of letters" in found.what
    assert not [*system_messages(scorer(workspace, apply_chat_template=False))]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rope_parameters": None, "rope_theta": 500000.0}, "rope_theta is 500000.0, that of base 10000.0"),
        ({"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}, "rope_theta is 500000.0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}, "'factor': 4.0"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, "'rope_type': 'linear'"),
        ({"max_position_embeddings": 4096}, "max_position_embeddings is 4096, that of base 64"),
    ],
)
def test_other_rotary_embeddings_are_named(workspace: Workspace, keys: dict[str, Any], said: str) -> None:
    change(workspace.root / "one" / "config.json", **keys)
    found = only(rope(scorer(workspace)))
    assert found.model == "one"
    assert said in found.what


def test_ways_of_writing_the_same_rotary_embeddings_are_the_same(workspace: Workspace) -> None:
    change(workspace.root / "one" / "config.json", rope_parameters=None, rope_theta=10000.0)
    assert not [*rope(scorer(workspace))]


@pytest.mark.parametrize(("said", "warned"), [("org/Base", False), ("base", False), ("meta/Llama-3.1-8B", True)])
def test_an_adapter_of_another_model_by_its_own_word_is_named(workspace: Workspace, said: str, warned: bool) -> None:
    config = new_adapter(workspace.root / "lora", workspace.root / "base") / "adapter_config.json"
    assert not [*adapters(scorer(workspace, genome={**GENOME, "models": ["one", "base+lora"]}))]
    change(config, base_model_name_or_path=said)
    found = [*adapters(scorer(workspace, genome={**GENOME, "models": ["one", "base+lora"]}))]
    assert [(of.model, f"trained on {said}" in of.what) for of in found] == [("lora", True)] * warned


def test_equal_shapes_that_compute_something_else_are_named(workspace: Workspace) -> None:
    change(workspace.root / "two" / "config.json", rms_norm_eps=0.1, model_type="mistral")
    found = only(functions(scorer(workspace)))
    assert "rms_norm_eps is 0.1" in found.what
    assert "model_type is mistral, that of base llama" in found.what


def test_digits_that_the_result_will_not_have(workspace: Workspace) -> None:
    assert not [*dtypes(scorer(workspace))]
    found = only(dtypes(scorer(workspace, genome={**GENOME, "dtype": "bfloat16"})))
    assert "stored in float32, and the merge is written in bfloat16" in found.what


def test_models_stored_in_different_half_precisions(workspace: Workspace) -> None:
    for name, dtype in (("base", torch.bfloat16), ("one", torch.bfloat16), ("two", torch.float16)):
        file = workspace.root / name / "model.safetensors"
        save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    found = only(dtypes(scorer(workspace, genome={**GENOME, "dtype": "bfloat16"})))
    assert (found.model, found.what) == (
        "two",
        "stored in float16, base in bfloat16: they are rounded differently",
    )


def test_heads_that_one_model_ties_and_another_does_not(workspace: Workspace) -> None:
    change(workspace.root / "two" / "config.json", tie_word_embeddings=False)
    found = only(tied_heads(scorer(workspace)))
    assert "tie_word_embeddings is false, that of base true" in found.what


def test_a_head_of_its_own_under_a_tied_config_is_not_used(workspace: Workspace) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        shutil.rmtree(workspace.root / name)
        tiny_llama(seed, tied=False).save_pretrained(workspace.root / name)
        tiny_tokenizer().save_pretrained(workspace.root / name)
        change(workspace.root / name / "config.json", tie_word_embeddings=True)
    assert [found.model for found in tied_heads(scorer(workspace))] == ["one", "two"]


@pytest.mark.parametrize(
    ("declared", "named", "said"),
    [
        (("mit", "mit", "cc-by-nc-4.0"), "two", "forbids commercial use, next to mit"),
        (("llama3.1", "llama3.1", "apache-2.0"), "base, one", "'Built with Llama'"),
        (("gemma", "apache-2.0", "apache-2.0"), "base", "use restrictions"),
        (("apache-2.0", "gpl-3.0", "apache-2.0"), "one", "gpl-3.0 wants the result under itself"),
        (("mit", "mit", "cc-by-nd-4.0"), "two", "no derived works"),
        (("mit", "mit", "other"), "two", "its card says 'other'"),
        (("mit", "mit", "'CC-BY-NC-4.0'"), "two", "cc-by-nc-4.0"),
    ],
)
def test_licences_that_ask_something(workspace: Workspace, declared: tuple[str, ...], named: str, said: str) -> None:
    for name, licence in zip(("base", "one", "two"), declared, strict=True):
        card(workspace.root / name, licence)
    found = only(licences(scorer(workspace)))
    assert found.model == named
    assert said in found.what
    assert found.remedy.startswith("Check")


def test_copyleft_beside_a_community_licence_and_no_licence_at_all(workspace: Workspace) -> None:
    card(workspace.root / "base", "llama2")
    card(workspace.root / "one", "agpl-3.0")
    said = {found.model: found.what for found in licences(scorer(workspace))}
    assert "llama2 asks for more" in said["one"]
    assert said["two"] == "no card names a licence"
    assert "base" in said


def test_free_licences_and_a_single_one_need_no_word(workspace: Workspace) -> None:
    for declared in (("mit", "apache-2.0", "bsd-3-clause"), ("gemma", "gemma", "gemma")):
        for name, licence in zip(("base", "one", "two"), declared, strict=True):
            card(workspace.root / name, licence)
        assert not [*licences(scorer(workspace))]


def test_what_does_not_fit_into_memory_is_said_with_both_figures(workspace: Workspace) -> None:
    assert not [*memory(scorer(workspace))]
    found = only(memory(scorer(workspace, engine={"cache_gb": 1e6})))
    assert "need 1000000.0 GB" in found.what
    assert "engine.cache_gb" in found.remedy


def test_memory_is_counted_by_files_and_tensors(workspace: Workspace) -> None:
    of = memory_of(scorer(workspace, engine={"cache_gb": 0.25}))
    files = [workspace.root / name / "model.safetensors" for name in ("base", "one", "two")]
    assert of.weights == sum(file.stat().st_size for file in files)
    assert of.engine == sum(tensor.numel() * 4 for tensor in load_file(files[0]).values())
    assert of.caches == 250_000_000


def test_a_model_that_is_the_base_changes_nothing(workspace: Workspace) -> None:
    shutil.copy(workspace.root / "base" / "model.safetensors", workspace.root / "two" / "model.safetensors")
    said = {found.model: found.what for found in vectors(scorer(workspace))}
    assert "its genes change nothing" in said["two"]
    assert "the size of the base" in said["one"]  # random weights are no fine-tune


def test_two_copies_are_nearly_one_model(workspace: Workspace) -> None:
    shutil.copy(workspace.root / "one" / "model.safetensors", workspace.root / "two" / "model.safetensors")
    assert (
        "they are nearly one model" in {found.model: found.what for found in vectors(scorer(workspace))}["one and two"]
    )


def test_rounding_is_said_where_it_loses_most(workspace: Workspace) -> None:
    base = load_file(workspace.root / "base" / "model.safetensors")
    for name, shift in (("one", 1e-5), ("two", -2e-5)):
        file = workspace.root / name / "model.safetensors"
        save_file({key: tensor + shift for key, tensor in base.items()}, file, {"format": "pt"})
    lost = rounding_loss(scorer(workspace, genome={**GENOME, "dtype": "bfloat16"}))
    assert lost > 0.5
    assert "genome.dtype: float32" in only(rounded(lost, "bfloat16")).remedy
    assert not [*rounded(rounding_loss(scorer(workspace)), "float32")]


def test_checks_that_fail_for_one_reason_are_one_line(workspace: Workspace) -> None:
    (workspace.root / "two" / "config.json").unlink()
    said = [str(found) for found in preflight.preflight(scorer(workspace)) if "could not be checked" in found.what]
    assert len(said) == 1
    assert said[0].startswith("rope, functions, tied heads: could not be checked (")


def test_files_that_cannot_be_read_stop_nothing(workspace: Workspace) -> None:
    (workspace.root / "two" / "generation_config.json").write_text("{")
    said = [str(found) for found in preflight.preflight(scorer(workspace))]
    assert any("special tokens: could not be checked" in line for line in said)


def test_a_run_begins_with_a_few_lines_of_warning(workspace: Workspace) -> None:
    change(workspace.root / "two" / "config.json", rope_parameters=None, rope_theta=500000.0)
    config = workspace.config(search={"optimizer": "random", "budget": 4}, heldout=None, engine={"self_check": False})
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    assert "! two: rope_theta is 500000.0, that of base 10000.0" in printed
    assert len(preflight.brief(scorer(workspace), most=1)) == 2


def test_held_out_questions_that_are_nearly_searched_on_are_counted(workspace: Workspace) -> None:
    story = "Ann has three red apples and gives one of them to Bob who eats it while Carl is watching them both"
    story += " from the garden behind the house of his aunt"
    for name, end in (("letters", "today"), ("letters_heldout", "now")):
        file = workspace.root / "tasks" / f"{name}.jsonl"
        rows = file.read_text().splitlines()
        file.write_text(
            "\n".join([json.dumps({**json.loads(rows[0]), "question": f"{story} {end}"}), *rows[1:]]) + "\n"
        )
    found = only(questions(scorer(workspace)))
    assert found.model == "heldout questions"
    assert found.what.startswith("1 are nearly search questions")


PARTS = {"one": ["letters"], "two": ["words"], "three": ["letters", "words"]}


def prepared(workspace: Workspace, **prepare: Any) -> list[Finding]:
    genome = {**GENOME, "models": [*PARTS], "prepare": prepare}
    return [*preparation(scorer(workspace, genome=genome))]


@pytest.mark.parametrize("tasks", [None, {name: ["letters"] for name in PARTS}], ids=["none", "equal"])
def test_models_that_regmean_measures_on_the_same_texts_are_said_to_merge_to_their_mean(
    workspace: Workspace, tasks: Any
) -> None:
    shutil.copytree(workspace.root / "two", workspace.root / "three")
    found = only(prepared(workspace, steps=["svd_llm", "regmean"], tasks=tasks))
    assert found.model == "genome.prepare"
    assert found.what == "regmean measures all models on the same texts, so the merge is near their mean"


def test_models_that_are_measured_on_the_texts_of_all_tasks_beside_others_are_named(workspace: Workspace) -> None:
    shutil.copytree(workspace.root / "two", workspace.root / "three")
    found = only(prepared(workspace, steps=["regmean"], tasks={"one": ["letters"]}))
    assert found.model == "genome.prepare.tasks"
    assert found.what.startswith("two, three are not listed")


@pytest.mark.parametrize(
    "prepare", [{"steps": ["regmean"], "tasks": PARTS}, {"steps": ["aim", "wudi"]}, {"steps": ["svd_llm"]}], ids=str
)
def test_a_preparation_that_knows_whose_tasks_are_whose_or_needs_none_is_not_warned_of(
    workspace: Workspace, prepare: Any
) -> None:
    shutil.copytree(workspace.root / "two", workspace.root / "three")
    assert not prepared(workspace, **prepare)


def test_repeated_questions_of_a_task_are_counted_over_its_sets(workspace: Workspace) -> None:
    file = workspace.root / "tasks" / "letters.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("\n".join([*rows, *rows[:5]]) + "\n")
    split = {"search": 0.5, "selection": 0.2, "heldout": 0.3}
    found = only(repetitions(scorer(workspace, split=split, heldout=None)))
    assert (found.model, found.what) == ("letters", "5 of its 17 questions are repeated")


def test_solved_examples_that_hold_the_question_are_counted(workspace: Workspace) -> None:
    file = workspace.root / "tasks" / "letters.jsonl"
    rows = file.read_text().splitlines()
    assert not [*examples(scorer(workspace, num_fewshot=1))]
    assert not [*examples(scorer(workspace))]
    # `datasets` gives every row the columns of all; a row that is the same in all of them is no example of its own.
    numbered = [json.dumps({**json.loads(row), "id": place}) for place, row in enumerate([*rows, *rows[:5]])]
    file.write_text("\n".join(numbered) + "\n")
    found = only(examples(scorer(workspace, num_fewshot=1)))
    assert found.model == "search: letters"
    assert found.what.startswith("10 of its questions are also among its solved examples")


def test_a_task_that_shows_no_solved_examples_whatever_the_config_says_is_named(workspace: Workspace) -> None:
    file = workspace.root / "tasks" / "letters.yaml"
    file.write_text(file.read_text() + "num_fewshot: 0\n")
    found = only(examples(scorer(workspace, num_fewshot=2)))
    assert (found.model, "letters" in found.what, "letters_heldout" in found.what) == ("num_fewshot: 2", True, False)
    assert not [*examples(scorer(workspace, num_fewshot=0))]


def test_questions_without_a_value_are_counted(workspace: Workspace) -> None:
    file = workspace.root / "tasks" / "letters.jsonl"
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    rows[0]["question"] = "is it None"
    for row in rows[3:5]:
        row["question"] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = only(nulls(scorer(workspace)))
    assert found.model == "search: letters"
    assert found.what == "2 of its questions have no value of 'question', and show it as 'None'"
