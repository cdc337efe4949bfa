"""Runs that search layer paths: their log, its replay, a stop and a resume, sizes as objectives, and the export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmevo.config import parse_config
from llmevo.errors import ConfigError, RunError
from llmevo.export.runs import open_run
from llmevo.merging.path import LayerPath
from llmevo.merging.recipe import Recipe
from llmevo.models.gains import Branches
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.run import experiment
from llmevo.run.log import events
from llmevo.run.log.journal import Journal
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, read_log, trust
from llmevo.run.preflight import preflight
from llmevo.run.verify import verify
from support.resumable import CountedRig, bench_of, carry_on
from support.tiny_model import tiny_llama
from support.workspace import Workspace

LAYERS = 8


@pytest.fixture
def deep(workspace: Workspace) -> Workspace:
    """A workspace whose models have eight layers."""
    for seed, name in enumerate(("base", "one", "two")):
        tiny_llama(seed, num_hidden_layers=LAYERS).save_pretrained(workspace.root / name)
    return workspace


def rig(
    workspace: Workspace, optimizer: str = "paths", path: dict[str, Any] | None = None, **changes: Any
) -> CountedRig:
    search = {"optimizer": optimizer, "budget": 16, "population": 4, "seed": 3, **changes.pop("search", {})}
    raw = {
        "genome": {
            "base_model": "base",
            "models": ["one", "two"],
            "merge_method": "task_arithmetic",
            "path": {"deepest": 10, **(path or {})},
        },
        "tasks": ["letters"],
        "heldout": ["letters_heldout"],
        "apply_chat_template": False,
        "task_search_path": ["tasks"],
        "search": search,
        "llm": {"proposer": "simulated"},
        **changes,
    }
    return CountedRig(parse_config(raw, str(workspace.root)), workspace.root)


def state_of(folder: Path) -> RunState:
    return RunState.fold(iter(read_log(folder)))


@pytest.mark.parametrize(
    "search",
    [
        {"optimizer": "paths"},
        {"optimizer": "paths-ga"},
        {"optimizer": "paths-cma-es"},
        {"optimizer": "llm", "spaces": "both", "budget": 24},
        {"optimizer": "random", "spaces": "both", "budget": 24},
    ],
    ids=lambda search: "-".join(map(str, search.values())),
)
def test_a_run_is_verified_and_goes_on_after_every_stop_as_if_there_was_none(
    deep: Workspace, search: dict[str, Any]
) -> None:
    folder = deep.root / "whole"
    scored, prompts = carry_on(rig(deep, search=search), folder)
    assert verify(read_log(folder), folder)
    lines = (folder / LOG).read_bytes().splitlines(keepends=True)
    state = state_of(folder)
    assert bool(prompts) == (search["optimizer"] in ("llm", "paths"))
    paths = [candidate for candidate in state.candidates.values() if candidate.path]
    assert len(paths) >= 7
    for candidate in paths:
        depth = len(LayerPath.parse(candidate.path))
        assert depth <= 10
        slices = Recipe.model_validate(state.recipes[candidate.id]).slices or []
        assert sum(of.depth for of in slices) == depth
    for count in (9, len(lines) // 2, len(lines) - 4):
        again = deep.root / f"again-{count}"
        again.mkdir()
        (again / LOG).write_bytes(b"".join(lines[:count]))
        trust(again)
        fewer, _ = carry_on(rig(deep, search=search), again)
        assert fewer < scored
        assert [_essence(event) for event in read_log(again)] == [_essence(event) for event in read_log(folder)]


def _essence(event: events.Event) -> dict[str, Any]:
    return event.model_dump(mode="json", exclude={"time", "seconds", "schema_", "root", "cached"})


FORTY = {"minutes": 40 * 0.25 / 60}
"""Room for 40 candidates."""


def test_both_spaces_have_their_shares_of_the_evaluations_that_fit_into_the_minutes(deep: Workspace) -> None:
    folder = deep.root / "run"
    carry_on(rig(deep, "random", search={"budget": FORTY, "spaces": "both"}), folder)
    origins = [candidate.origin for candidate in state_of(folder).candidates.values()]
    assert (len(origins), origins.index("paths"), origins.index("path-numbers")) == (40, 20, 31)
    assert verify(read_log(folder), folder)


def test_a_log_of_rules_4_is_verified_with_the_shares_of_all_evaluations_that_a_run_may_have(
    deep: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = deep.root / "run"
    with monkeypatch.context() as earlier:
        earlier.setattr(experiment, "RULES", 4)
        carry_on(rig(deep, "random", search={"budget": FORTY, "spaces": "both"}), folder)
    assert not any(candidate.path for candidate in state_of(folder).candidates.values())
    assert verify(read_log(folder), folder)


def test_a_model_that_completes_texts_is_not_taken_for_paths(deep: Workspace) -> None:
    config = deep.config(search={"optimizer": "paths", "budget": 16}, llm={"proposer": "local"})
    status, printed = deep.llmevo("run", config, "--out", "run")
    assert status == 2
    assert "llm.proposer: local completes texts, and layer paths are asked of a chat" in " ".join(printed.split())


FEW = {"deepest": LAYERS, "kinds": ["skip"], "edits": 1}
"""Settings of fewer paths than a budget of 40."""


def asked_in_vain(folder: Path) -> int:
    return sum(isinstance(event, events.Asked) and not event.candidates for event in read_log(folder))


@pytest.mark.parametrize("optimizer", ["paths", "paths-random", "paths-ga", "paths-exhaustive"])
def test_a_search_whose_paths_are_used_up_ends_with_the_finals_and_says_so(deep: Workspace, optimizer: str) -> None:
    folder, said, scorer = deep.root / "run", list[str](), rig(deep, optimizer, FEW, search={"budget": 40})
    scorer.warn = said.append
    carry_on(scorer, folder)
    state = state_of(folder)
    assert state.finished
    assert 10 < len(state.trials) < 40
    assert asked_in_vain(folder) == 1
    assert [line for line in said if "genome.path" in line] == [
        f"The search ends with budget left: '{optimizer}' finds no further path. Allow more edits, kinds or layers in"
        " genome.path for more candidates"
    ]
    assert verify(read_log(folder), folder)


def test_a_log_in_which_used_up_paths_were_asked_for_again_verifies_and_goes_on(
    deep: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = deep.root / "run"
    with monkeypatch.context() as earlier:
        vain = iter([events.Asked] * 3)
        earlier.setattr(Journal, "recorded_next", property(lambda _: next(vain, None)))
        carry_on(rig(deep, "paths", FEW, search={"budget": 40}), folder)
    assert asked_in_vain(folder) == 4
    assert verify(read_log(folder), folder)
    again = deep.root / "again"
    again.mkdir()
    text = (folder / LOG).read_bytes()
    (again / LOG).write_bytes(text[: text.index(b"\n", text.rindex(b'"event":"told"')) + 1])
    trust(again)
    carry_on(rig(deep, "paths", FEW, search={"budget": 40}), again)
    assert state_of(again).finished
    assert asked_in_vain(again) == 4


def test_a_changed_path_in_a_log_is_found(deep: Workspace) -> None:
    folder = deep.root / "run"
    carry_on(rig(deep), folder)
    text = (folder / LOG).read_text()
    path = next(candidate.path for candidate in state_of(folder).candidates.values() if candidate.path)
    (folder / LOG).write_text(text.replace(json.dumps(path), json.dumps("one 0-7 | two 7-8"), 1))
    with pytest.raises(RunError):
        verify(read_log(folder), folder)


def test_the_best_recipe_is_a_plain_recipe_of_its_own(deep: Workspace) -> None:
    folder = deep.root / "run"
    carry_on(rig(deep, search={"budget": 24}), folder)
    state = state_of(folder)
    assert state.best is not None
    written = Recipe.from_yaml((folder / "best.yml").read_text())
    assert written == Recipe.model_validate(state.recipes[state.best.candidate.id])


def test_a_run_of_weights_has_no_paths_in_its_log(deep: Workspace) -> None:
    folder = deep.root / "run"
    carry_on(rig(deep, "random"), folder)
    asked = [event for event in read_log(folder) if isinstance(event, events.Asked)]
    assert all("path" not in candidate for event in asked for candidate in event.candidates)


def test_the_users_own_paths_and_stacks_are_start_rows(deep: Workspace) -> None:
    stack = [{"sources": [{"model": "one", "layer_range": span}]} for span in ([0, 6], [4, 8])]
    (deep.root / "stack.yml").write_text(
        yaml.safe_dump({"merge_method": "passthrough", "slices": stack, "dtype": "float32"})
    )
    gains = LayerPath.parse("one 0-6 | one 4-6 gain 0.5 | one 6-8")
    model = Sources(deep.root)
    one = ModelReference.parse("one")
    recipe = gains.recipe({"one": one}, Branches(model[one].shapes, model.config(one)), dtype="float32")
    assert "scale" in recipe.to_yaml()  # mergekit's own form
    (deep.root / "gains.yml").write_text(recipe.to_yaml())
    mine = ["stack.yml", {"path": "one 0-4 | two 4-6 | one 6-8"}, "gains.yml"]
    folder = deep.root / "run"
    carry_on(rig(deep, search={"start_from": mine}), folder)
    own = [c for c in state_of(folder).candidates.values() if c.origin == "user"]
    assert [(c.note, c.path) for c in own] == [
        ("stack", "one 0-6 | one 4-8"),
        ("path", "one 0-4 | two 4-6 | one 6-8"),
        ("gains", str(gains)),
    ]
    assert verify(read_log(folder), folder)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"path": "one 0-9"}, "search.start_from: path: path: segment 1 ('one 0-9'): one has 8 layers"),
        ({"path": "one 0-7 | one 1-8"}, "it has 14 layers, more than 10"),
        ({"path": "one 0-8", "one/all/weight": 1.0}, "give a path alone"),
        ({"one/all/weight": "much"}, "could not convert"),
        ({"path": "one 0-6 | one 4-8"}, "is not among genome.path.kinds (skip)"),
        ({"path": "one 0-2 | one 3-5 | one 6-8"}, "it has 2 edits"),
    ],
)
def test_own_paths_outside_the_bounds_are_refused(deep: Workspace, entry: dict[str, Any], told: str) -> None:
    few = {"kinds": ["skip"], "edits": 1} if "edits" in told or "kinds" in told else {}
    with pytest.raises(ConfigError) as caught:
        carry_on(rig(deep, search={"start_from": [entry]}, path=few), deep.root / "run")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"search": {"spaces": "all"}}, "search.spaces: Input should be 'auto' or 'both'"),
        ({"search": {"spaces": "both"}}, "both searches weights first, and 'paths' searches layer paths alone"),
        (
            {"search": {"optimizer": "random", "spaces": "both", "order": "steady"}},
            "asked for in generations; give strict",
        ),
        ({"search": {"order": "steady"}}, "asked for in generations; give strict"),
        ({"search": {"shares": [0.5, 0.5]}}, "search.shares"),
        ({"search": {"shares": [0.5, 0.5, 0.5]}}, "give three numbers over 0 with the sum 1"),
        ({"search": {"shares": [1.0, 0.5, -0.5]}}, "give three numbers over 0 with the sum 1"),
        ({"search": {"optimizer": "path"}}, "optimizer 'path' is unknown, did you mean 'paths'"),
        ({"search": {"sizes": ["layers"]}}, "layers is one of several objectives, and the objective is a sum"),
        ({"search": {"sizes": ["depth"], "objective": "pareto"}}, "Input should be 'layers', 'parameters' or 'time'"),
        ({"constraints": ["layer <= 8"]}, "names 'layer', which is not in `tasks:`, did you mean 'layers'"),
        ({"constraints": ["layers = 8"]}, "'=' is unknown; give >= or <="),
        ({"path": {"deepest": "deep"}}, "genome.path.deepest"),
        ({"path": {"depth": 9}}, "genome.path.depth: there is no such key"),
    ],
)
def test_a_config_that_fits_no_search_of_paths_is_refused_in_one_line(
    deep: Workspace, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        rig(deep, **changes)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scan_is_read_once_and_stands_in_the_log(deep: Workspace) -> None:
    row = {"kind": "skip", "path": "one 0-3 | one 4-8", "effect": 0.2, "stderr": 0.1, "score": -1.0}
    model = {"kind": "model", "path": "one 0-8", "score": -1.2, "effect": 0.0, "stderr": 0.1}
    (deep.root / "scan").mkdir()
    (deep.root / "scan" / "scan.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in ({"scan": "x"}, model, row))
    )
    folder = deep.root / "run"
    carry_on(rig(deep, path={"scan": "scan"}), folder)
    started = state_of(folder).started
    assert started
    assert started.scan == {"one 0-3 | one 4-8": (0.2, 0.1)}
    (deep.root / "scan" / "scan.jsonl").unlink()
    assert verify(read_log(folder), folder)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("{", "is no scan"),
        ("[]\n", "is no scan"),
        ('{"scan": "x"}\n', "has no measured edit"),
    ],
)
def test_a_file_that_is_no_scan_is_refused_in_one_line(deep: Workspace, text: str | None, told: str) -> None:
    if text is not None:
        (deep.root / "scan.jsonl").write_text(text)
    with pytest.raises(ConfigError) as caught:
        carry_on(rig(deep, path={"scan": "scan.jsonl"}), deep.root / "run")
    assert told in str(caught.value)
    assert str(caught.value).startswith("genome.path.scan: ")
    assert "\n" not in str(caught.value)


def test_a_bound_on_the_size_is_kept_by_every_path_and_sizes_are_judged(deep: Workspace) -> None:
    folder = deep.root / "run"
    carry_on(rig(deep, constraints=["layers <= 9"]), folder)
    state = state_of(folder)
    depths = [len(LayerPath.parse(candidate.path)) for candidate in state.candidates.values() if candidate.path]
    assert max(depths) == 9
    assert not any(trial.violation for trial in state.trials.values())
    assert verify(read_log(folder), folder)
    below = deep.root / "below"
    carry_on(rig(deep, path={"kinds": ["skip"]}, constraints=["layers <= 7"]), below)
    state = state_of(below)
    assert {trial.reason for trial in state.trials.values() if not trial.candidate.path} == {"violates layers <= 7 (8)"}
    assert state.best is not None
    assert len(LayerPath.parse(state.best.candidate.path)) <= 7
    assert verify(read_log(below), below)


def test_the_time_for_a_token_is_bounded_by_the_weights_that_it_is_multiplied_by(deep: Workspace) -> None:
    folder = deep.root / "run"
    carry_on(rig(deep, constraints=["time <= 0.9"]), folder)
    state = state_of(folder)
    assert state.started is not None
    model = tiny_llama(num_hidden_layers=LAYERS)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel()
    found = [(len(LayerPath.parse(t.candidate.path)), t) for t in state.trials.values() if t.candidate.path and t.score]
    assert len({depth for depth, _ in found}) > 1
    for depth, trial in found:
        assert trial.score
        time = trial.score.tasks["time"]["count"]
        assert time == pytest.approx((head + depth * layer) / (head + LAYERS * layer))
        assert bool(trial.violation) == (time > 0.9)
    assert verify(read_log(folder), folder)


def test_with_sizes_as_objectives_the_front_has_small_models_and_good_ones(deep: Workspace) -> None:
    folder = deep.root / "run"
    sizes = {"objective": "pareto", "sizes": ["parameters"], "budget": 30}
    carry_on(rig(deep, search=sizes), folder)
    state = state_of(folder)
    assert state.started is not None
    each, others = state.started.layer_parameters, state.started.other_parameters
    model = tiny_llama(num_hidden_layers=LAYERS)
    assert others + sum(each) == sum(parameter.numel() for parameter in model.parameters())
    found = {
        trial.candidate.id: (trial.score.total, trial.score.tasks["parameters"]["count"])
        for trial in state.trials.values()
        if trial.score
    }
    front = {trial.candidate.id for trial in state.front}
    assert front == {
        number
        for number, (score, size) in found.items()
        if not any(s >= score and z <= size and (s, z) != (score, size) for s, z in found.values())
    }
    assert len({size for number, (_, size) in found.items() if number in front}) > 1
    assert verify(read_log(folder), folder)


def test_models_that_are_too_shallow_for_paths_are_refused(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match="so nothing is left to edit"):
        carry_on(rig(workspace), workspace.root / "run")


@pytest.mark.parametrize("search", [{"optimizer": "paths"}, {"optimizer": "llm-off", "spaces": "both"}], ids=str)
def test_bounds_that_leave_nothing_to_edit_are_refused_before_a_run(deep: Workspace, search: dict[str, Any]) -> None:
    given = deep.config(genome={**GENOME, "path": {"first": 5, "last": 5}}, search={**search, "budget": 30})
    status, printed = deep.llmevo("run", given)
    assert status == 2, printed
    assert "so nothing is left to edit" in printed
    assert not (deep.root / "runs").exists()


GENOME: dict[str, Any] = {
    "base_model": "base",
    "models": ["one", "two"],
    "merge_method": "task_arithmetic",
    "dtype": "float32",
    "path": {"deepest": 10},
}


def test_the_command_line_searches_paths_with_real_models_and_exports_the_best(deep: Workspace) -> None:
    search = {"optimizer": "random", "spaces": "both", "budget": 12, "shares": [0.4, 0.4, 0.2], "population": 4}
    config = deep.config(genome=GENOME, search=search, llm=None)
    status, printed = deep.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    state = deep.state("run")
    paths = [trial for trial in state.trials.values() if trial.candidate.path]
    assert len(paths) >= 4
    assert all(trial.score for trial in paths), [trial.reason for trial in paths]
    assert deep.llmevo("replay", "run", "--verify")[0] == 0
    chosen = max(paths, key=lambda trial: trial.value).candidate
    status, printed = deep.llmevo("export", "run", "out", "--candidate", chosen.id)
    assert status == 0, printed
    written = json.loads((deep.root / "out" / "config.json").read_text())
    assert written["num_hidden_layers"] == len(LayerPath.parse(chosen.path))
    assert open_run(deep.root / "run").trials[chosen.id].path == chosen.path


def test_the_report_names_the_path_of_the_best(deep: Workspace) -> None:
    folder = deep.root / "run"
    carry_on(rig(deep, search={"budget": 24}), folder)
    best = state_of(folder).best
    assert best
    assert best.candidate.path
    status, printed = deep.llmevo("report", folder)
    assert status == 0, printed
    assert f"is a layer path: <code>{best.candidate.path}</code>" in (folder / "report.html").read_text()


@pytest.mark.parametrize("search", [{"optimizer": "paths"}, {"optimizer": "llm", "spaces": "both"}])
def test_inspect_shows_the_depth_of_paths_and_the_first_prompt(deep: Workspace, search: dict[str, Any]) -> None:
    llm = {"proposer": "simulated", "model": "random"}
    status, printed = deep.llmevo("inspect", deep.config(genome=GENOME, search={"budget": 20, **search}, llm=llm))
    assert status == 0, printed
    assert "over 8 layers, and paths of up to 10 layers" in " ".join(printed.split())
    assert ("Rules for every path" in printed) is (search["optimizer"] == "paths")


def test_a_scan_of_other_models_is_refused(deep: Workspace) -> None:
    row = {"kind": "skip", "path": "other 0-3 | other 4-8", "effect": 0.2, "stderr": 0.1, "score": -1.0}
    (deep.root / "scan.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=r"genome.path.scan: scan.jsonl is of other models: no path in it"):
        carry_on(rig(deep, path={"scan": "scan.jsonl"}), deep.root / "run")


@pytest.mark.parametrize("optimizer", ["paths-exhaustive", "paths-cma-es"])
def test_an_optimizer_that_makes_edits_of_other_kinds_is_refused(deep: Workspace, optimizer: str) -> None:
    with pytest.raises(ConfigError, match=rf"genome.path.kinds: '{optimizer}' makes repeat"):
        bench_of(rig(deep, optimizer, path={"kinds": ["skip"]}), []).check_config()


def test_a_fault_in_the_prompts_of_paths_shows_before_anything_is_scored(deep: Workspace) -> None:
    folder = deep.root / "prompts"
    shutil.copytree(Path(__file__).parents[2] / "prompts", folder)
    file = folder / "paths_user.j2"
    file.write_text(file.read_text() + "{{ nosuch.thing }}")
    with pytest.raises(ConfigError, match=r"paths_user.j2: 'nosuch' is undefined"):
        bench_of(rig(deep, llm={"proposer": "simulated", "prompts": "prompts"}), []).check_config()


def test_paths_that_the_optimizer_does_not_try_are_a_finding(deep: Workspace) -> None:
    def found(**search: Any) -> list[str]:
        return [str(one) for one in preflight(rig(deep, search=search)) if one.model == "genome.path"]

    assert found(optimizer="random") == [
        "genome.path: random searches weights, and no candidate will be a layer path."
        " Set `optimizer: paths` or `spaces: both` under `search:`, or leave genome.path out."
    ]
    assert not found(optimizer="paths")
    assert not found(optimizer="random", spaces="both")
