"""The run as a user sees it, on tiny models."""

import json
import re
from typing import Any

import pytest
import torch
import yaml

from llmevo.config import read_config
from llmevo.engines.hf import HfEngine
from llmevo.errors import CandidateError
from llmevo.export.pack import SharedRun
from llmevo.merging.recipe import Recipe
from llmevo.run.experiment import Experiment, population
from llmevo.run.log.events import Evaluated
from llmevo.run.log.storage import LOG
from llmevo.run.scorer import Scorer
from support.fake_server import Answer, chat, refusal, serving
from support.stopping import interrupted_at
from support.workspace import Workspace

KEY = "sk-secret-0123456789"


def good_answer(slices: int = 2, genes: int = 2, first: int = 40) -> str:
    """A chat model's answer: two proposals for the workspace's genome."""
    tables = [[[first + 7 * (i + j + k) for i in range(genes)] for j in range(slices)] for k in range(2)]
    proposals = [{"reason": f"idea {k}", "genome": table} for k, table in enumerate(tables)]
    return json.dumps({"analysis": "both models help", "proposals": proposals})


def test_a_run_scores_parents_and_uniform_first_and_keeps_to_its_budget(workspace: Workspace) -> None:
    printed = workspace.finished()
    state = workspace.state("run")
    assert [state.candidates[i].origin for i in range(4)] == ["uniform", "coefficient", "parent", "parent"]
    assert state.candidates[1].note == "coefficient 0.71"
    assert len(state.trials) == 9
    assert {candidate.origin for candidate in state.candidates.values()} >= {"gaussian"}
    assert state.finished is not None
    assert [row.kind for row in state.heldout.values()] == [
        *("base", "parent", "parent", "uniform", "coefficient", "best")
    ]
    assert [row["row"] for row in (state.finished.heldout or {})["rows"]][-2:] == ["coefficient 0.71", "best"]
    assert "held-out" in printed
    assert "llmevo export run OUT" in printed


def test_every_figure_of_the_end_can_be_recomputed_from_the_log(workspace: Workspace) -> None:
    workspace.finished()
    state = workspace.state("run")
    assert state.finished is not None
    assert state.best is not None
    scores = {trial.candidate.id: trial.value for trial in state.trials.values()}
    assert state.finished.search_score == max(scores.values())
    assert scores[state.finished.best or 0] == max(scores.values())
    for event in state.trials.values():
        assert event.score is not None
        assert event.value == pytest.approx(event.score.tasks["letters"]["acc,none"])


def test_best_yml_is_the_best_recipe_with_the_references_of_the_user(workspace: Workspace) -> None:
    workspace.finished()
    state = workspace.state("run")
    text = (workspace.root / "run" / "best.yml").read_text()
    assert state.best is not None
    assert Recipe.from_yaml(text) == Recipe.model_validate(state.recipes[state.best.candidate.id])
    assert str(workspace.root) not in text
    assert yaml.safe_load(text)["base_model"] == "base"


def test_the_same_config_and_seed_give_the_same_candidates_and_scores(workspace: Workspace) -> None:
    workspace.finished()
    workspace.llmevo("run", workspace.config(), "--out", "again")
    first, second = workspace.state("run"), workspace.state("again")
    assert first.candidates == second.candidates
    assert [t.value for t in first.trials.values()] == [t.value for t in second.trials.values()]


def test_recorded_replies_give_the_same_candidates_without_the_llm(workspace: Workspace) -> None:
    with serving(Answer({"data": []}), chat(good_answer()), chat(good_answer(first=15))) as server:
        config = workspace.config(llm={"proposer": "openai", "base_url": server.url})
        assert workspace.llmevo("run", config, "--out", "run")[0] == 0
    config = workspace.config(llm={"proposer": "recorded", "transcript": "run"})
    assert workspace.llmevo("run", config, "--out", "again")[0] == 0
    assert workspace.state("run").candidates == workspace.state("again").candidates


def test_proposals_of_a_server_become_candidates_with_its_reasons(workspace: Workspace) -> None:
    with serving(Answer({"data": []}), chat(good_answer()), chat(good_answer(first=15))) as server:
        search = {"optimizer": "llm", "budget": 10, "population": 3, "seed": 3}
        config = workspace.config(llm={"proposer": "openai", "base_url": server.url, "model": "m"}, search=search)
        status, printed = workspace.llmevo("run", config, "--out", "run", "--api-key", KEY)
    assert status == 0, printed
    proposed = [c for c in workspace.state("run").candidates.values() if c.origin == "llm"]
    assert proposed
    assert all("idea" in candidate.note for candidate in proposed)
    assert "both models help" in printed
    asked = [body for body in server.requests if body["path"].endswith("/chat/completions")]
    assert asked[0]["authorization"] == f"Bearer {KEY}"
    assert "No recipe is scored yet" in asked[0]["messages"][1]["content"]
    assert "uniform" in asked[-1]["messages"][1]["content"]
    first = [c for c in proposed if c.generation == 0]
    assert [c.id for c in first] == [4]  # after the start rows of the run, and before anything is scored


@pytest.mark.parametrize("masked", [False, True])
def test_cards_questions_and_replies_are_logged_for_the_prompt_and_shown_unless_masked(
    workspace: Workspace, masked: bool
) -> None:
    card = "This model was trained on the letters of the alphabet."
    (workspace.root / "one" / "README.md").write_text(f"# One\n\n{card}\n")
    workspace.finished(llm={"proposer": "simulated", "model": "random", "mask_names": masked})
    recorded, state = workspace.events("run"), workspace.state("run")
    assert state.started
    asked = state.prompted[-1].messages[-1]["content"]
    scored = [event for event in recorded if isinstance(event, Evaluated)]
    questions = [question for question, _ in state.started.texts["search"]["letters"]]
    if masked:
        assert (state.started.cards, state.started.chances, scored[0].replies) == ({}, {}, {})
        assert not any(question in asked for question in questions)
        assert "alphabet" not in asked
        return
    assert state.started.cards == {"one": card}
    assert 0 < state.started.chances["letters"] < 1
    assert [len(event.replies["letters"]) for event in scored] == [
        len(event.item_scores["letters"]) for event in scored
    ]
    assert f"card: {card}" in asked
    assert any(question in asked for question in questions)
    resumed = Experiment.of_log(state.started, workspace.root / "run")
    assert (resumed.cards, resumed.chances) == (state.started.cards, state.started.chances)
    published = SharedRun(recorded, workspace.root).log()
    assert f"card: {card}" in published
    assert not any(question in published for question in questions)


def test_the_key_is_in_no_file_and_on_no_line_of_output(workspace: Workspace) -> None:
    echo = refusal(400, f"I do not like {KEY}")
    with serving(Answer({"data": []}), echo) as server:
        config = workspace.config(llm={"proposer": "openai", "base_url": server.url, "retries": 0})
        status, printed = workspace.llmevo("run", config, "--out", "run", "--api-key", KEY)
    assert status == 0, printed
    assert KEY not in printed
    files = [file for file in workspace.root.rglob("*") if file.is_file()]
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


@pytest.mark.parametrize(
    "answer",
    [chat("I would rather not."), chat(""), chat('{"proposals": [{"genome": [[1,'), Answer("<html>busy</html>")],
    ids=["prose", "nothing", "half a JSON", "HTML"],
)
def test_a_server_that_talks_nonsense_never_ends_the_run(workspace: Workspace, answer: Answer) -> None:
    with serving(Answer({"data": []}), answer) as server:
        config = workspace.config(llm={"proposer": "openai", "base_url": server.url, "retries": 0})
        status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    state = workspace.state("run")
    assert len(state.trials) == 9
    assert state.finished is not None
    assert state.finished.proposals["used"] == 0
    assert all(event.problems for event in state.prompted)


def test_a_candidate_that_fails_is_an_event_and_the_run_goes_on(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Scorer.score, list[Recipe]()

    def sometimes(self: Scorer, recipe: Recipe, *given: Any, **named: Any) -> object:
        calls.append(recipe)
        if len(calls) == 4:
            raise CandidateError("the tensor blew up")
        return real(self, recipe, *given, **named)

    monkeypatch.setattr(Scorer, "score", sometimes)
    status, printed = workspace.llmevo("run", workspace.config(), "--out", "run")
    assert status == 0, printed
    state = workspace.state("run")
    assert state.trials[3].reason == "the tensor blew up"
    assert len(state.trials) == 9
    assert "failed: the tensor blew up" in printed


def test_a_run_whose_every_start_row_fails_ends_there_with_the_reason(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> object:
        raise CandidateError("the tensor blew up")

    monkeypatch.setattr(Scorer, "score", never)
    status, printed = workspace.llmevo("run", workspace.config(), "--out", "run")
    assert status == 2
    assert "all 4 start rows failed" in " ".join(printed.split())
    assert "the tensor blew up" in printed
    assert len(workspace.state("run").trials) == 4
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0
    assert workspace.llmevo("resume", "run")[0] == 2
    assert len(workspace.state("run").trials) == 4


def test_a_source_with_nan_fails_its_candidates_only(workspace: Workspace) -> None:
    from safetensors.torch import load_file, save_file

    file = workspace.root / "two" / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    status, printed = workspace.llmevo("run", workspace.config(), "--out", "run")
    assert status == 0, printed
    state = workspace.state("run")
    assert "model.norm.weight is not finite" in state.trials[3].reason
    assert state.trials[2].score is not None
    assert not {"two", "uniform", "coefficient 0.71"} & state.heldout.keys()


@pytest.mark.parametrize("at", [0, 2, 3, 5, 9, 11])
def test_a_run_stopped_anywhere_resumes_to_what_it_would_have_been(workspace: Workspace, at: int) -> None:
    workspace.finished(out="unbroken")
    config = workspace.config()
    with interrupted_at(at):
        status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 130
    assert "llmevo resume run" in printed
    before = (workspace.root / "run" / LOG).read_text()
    status, printed = workspace.llmevo("resume", "run")
    assert status == 0, printed
    assert (workspace.root / "run" / LOG).read_text().startswith(before)
    whole, broken = workspace.state("unbroken"), workspace.state("run")
    assert whole.candidates == broken.candidates
    assert [t.value for t in whole.trials.values()] == [t.value for t in broken.trials.values()]
    assert [e.reply for e in whole.prompted] == [e.reply for e in broken.prompted]
    assert whole.finished is not None
    assert broken.finished is not None
    assert whole.finished.heldout == broken.finished.heldout


def test_a_torn_last_line_is_cut_before_going_on(workspace: Workspace) -> None:
    workspace.finished()
    file = workspace.root / "run" / LOG
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:8]) + lines[8][:25])
    assert workspace.llmevo("resume", "run")[0] == 0
    assert len(workspace.events("run")) == len(lines)


def test_verify_accepts_a_run_and_names_a_changed_score(workspace: Workspace) -> None:
    workspace.finished()
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert status == 0, printed
    assert "Verified" in printed
    file = workspace.root / "run" / LOG
    lines = file.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if '"event":"evaluated"' in line)
    changed = json.loads(lines[place])
    changed["score"] += 0.5
    lines[place] = json.dumps(changed)
    file.write_text("\n".join(lines) + "\n")
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert status == 2
    assert "does not follow" in printed


def test_a_run_verifies_and_resumes_as_what_auto_meant_whatever_keys_have_come_since(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.llmevo("run", workspace.config(llm={"proposer": "auto"}), "--out", "run")
    started = workspace.state("run").started
    assert started is not None
    assert (started.proposer, started.style) == ("", "")  # no LLM: nothing says which
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0
    file = workspace.root / "run" / LOG
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:5]))
    assert workspace.llmevo("resume", "run")[0] == 0
    assert len(file.read_text().splitlines()) == len(whole.splitlines())


def test_a_run_with_a_server_verifies_without_server_and_key(workspace: Workspace) -> None:
    with serving(Answer({"data": []}), chat(good_answer())) as server:
        config = workspace.config(llm={"proposer": "auto", "base_url": server.url})
        assert workspace.llmevo("run", config, "--out", "run", "--api-key", KEY)[0] == 0
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert status == 0, printed


def test_a_prefix_of_a_log_verifies_as_unfinished(workspace: Workspace) -> None:
    workspace.finished()
    file = workspace.root / "run" / LOG
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:9]))
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert status == 0
    assert "unfinished" in printed


def test_random_init_adds_a_random_start_row(workspace: Workspace) -> None:
    status, _ = workspace.llmevo("run", workspace.config(random_init=True), "--optimizer", "random", "--out", "run")
    assert status == 0
    assert workspace.state("run").candidates[4].note == "random_init"


def test_a_parent_outside_the_bounds_is_a_row_but_not_a_point(workspace: Workspace) -> None:
    genome = {"base_model": "base", "models": ["one", "two"], "merge_method": "task_arithmetic", "dtype": "float32"}
    genome = {**genome, "bounds": {"weight": [0.0, 0.7]}}
    llm = {"proposer": "simulated", "model": "recombiner"}
    config = workspace.config(genome=genome, llm=llm, search={"optimizer": "llm", "budget": 12, "seed": 3})
    assert workspace.llmevo("run", config, "--out", "run")[0] == 0
    state = workspace.state("run")
    prompt = state.prompted[-1].messages[-1]["content"]  # the LLM is shown it, with its score
    assert f"- one #1: {state.trials[1].value:.3f}" in prompt
    assert int(re.findall(r"NOW: (\d+) of 12", prompt)[0]) > 4
    assert state.candidates[1].genes == {"one/all/weight": 1.0, "two/all/weight": 0.0}
    later = [c for c in state.candidates.values() if c.generation > 0]
    assert max(value for c in later for value in c.genes.values()) <= 0.7


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties", "task_arithmetic"])
def test_every_method_can_be_searched(workspace: Workspace, method: str) -> None:
    genome = {"base_model": "base", "models": ["one", "two"], "merge_method": method, "dtype": "bfloat16"}
    config = workspace.config(genome=genome, heldout=None)
    status, printed = workspace.llmevo("run", config, "--out", "run", "--budget", 6)
    assert status == 0, printed
    state = workspace.state("run")
    assert all(trial.score for trial in state.trials.values())
    assert "No `heldout:` tasks" in printed


def test_lora_adapters_are_parents_like_any_model(workspace: Workspace) -> None:
    from support.checkpoints import new_adapter

    new_adapter(workspace.root / "adapter", workspace.root / "base")
    genome = {"base_model": "base", "models": ["one", "base+adapter"], "merge_method": "task_arithmetic"}
    status, printed = workspace.llmevo("run", workspace.config(genome=genome), "--out", "run", "--budget", 5)
    assert status == 0, printed
    assert workspace.state("run").candidates[3].note == "adapter"


def test_a_search_of_choices_alone_ends_when_all_of_them_are_scored(workspace: Workspace) -> None:
    genome = {"base_model": "base", "models": ["one", "two"], "merge_method": ["karcher", "model_stock"]}
    config = workspace.config(genome=genome, heldout=None, search={"optimizer": "llm-off", "budget": 12})
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    assert "'llm-off' finds no further candidate" in " ".join(printed.split())
    state = workspace.state("run")
    assert [candidate.generation for candidate in state.candidates.values()] == [0, 0, 0, 1]
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


def test_the_size_of_populations_is_that_of_the_config(workspace: Workspace) -> None:
    search = {"optimizer": "cma-es", "budget": 16, "population": 5, "seed": 3}
    assert workspace.llmevo("run", workspace.config(heldout=None, search=search), "--out", "run")[0] == 0
    candidates = workspace.state("run").candidates.values()
    assert [sum(c.generation == place for c in candidates) for place in range(4)] == [4, 5, 5, 2]


def test_population_follows_the_rule_of_cma_es(workspace: Workspace) -> None:
    from llmevo.config import read_config

    config = read_config(workspace.config(search={"budget": 9}))
    experiment = Experiment(config, workspace.root)
    assert len(experiment.space.genes) == 4
    assert population(experiment) == 8


def test_search_and_heldout_must_not_share_a_question(workspace: Workspace) -> None:
    status, printed = workspace.llmevo("run", workspace.config(heldout=["letters"]), "--out", "run")
    assert status == 2
    assert "share no question" in printed
    assert not (workspace.root / "run").exists()


def test_a_third_model_of_another_shape_is_refused_before_anything_is_written(workspace: Workspace) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    wider = LlamaConfig(vocab_size=98, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(wider).save_pretrained(workspace.root / "wide")
    genome = {"base_model": "base", "models": ["one", "wide"], "merge_method": "task_arithmetic"}
    status, printed = workspace.llmevo("run", workspace.config(genome=genome), "--out", "run")
    assert status == 2
    assert "wide" in printed
    assert not (workspace.root / "run").exists()


def test_a_failure_has_the_seconds_since_its_merge_began(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(read_config(workspace.config(engine={"self_check": False})), workspace.root)
    recipe = scorer.space.decode(scorer.space.uniform())

    def swap(*_: object) -> None:
        raise CandidateError("it is no model")

    monkeypatch.setattr(HfEngine, "swap", swap)
    with pytest.raises(CandidateError) as caught:
        scorer.score(recipe)
    assert caught.value.seconds is not None


@pytest.mark.parametrize(("device", "backend"), [(None, "vllm"), ("cpu", "hf"), ("cuda:1", "hf")])
def test_a_device_is_for_the_engine_of_transformers(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, device: str | None, backend: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("llmevo.run.scorer.find_spec", lambda _: object())
    config = read_config(workspace.config(engine={"device": device}))
    assert Scorer(config, workspace.root).backend == backend
