"""What `llmevo inspect` prints: readable at 80 columns, and whole as JSON."""

import json
from typing import Any

import pytest
from rich.console import Console

from llmevo.cli import terminal
from llmevo.config import read_config
from llmevo.reports.terminal.inspection import cell, heatmap
from llmevo.run.experiment import Experiment
from llmevo.run.preflight.forecast import Forecast, Measured, forecast
from support.workspace import Workspace


def test_sections_come_most_important_first_and_fit_80_columns(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "console", Console(width=80, force_terminal=False))
    config = workspace.config(search={"optimizer": "random", "budget": 5})
    status, printed = workspace.llmevo("inspect", config)
    assert status == 0, printed
    uses = "What this config runs, opens and sends"
    headings = [
        "Forecast",
        "Warnings",
        uses,
        "Models",
        "Size of the task vectors, against the base",
        "4 genes over 2 layers",
    ]
    assert "runs the task files in" in printed
    places = [printed.index(f"\n{heading}\n") for heading in headings]
    assert places == sorted(places)
    assert max(len(line) for line in printed.splitlines()) <= 80
    assert "an estimate" in printed


def test_json_holds_what_is_shown(workspace: Workspace) -> None:
    few = {"optimizer": "llm", "budget": 6, "population": 3}
    status, printed = workspace.llmevo("inspect", workspace.config(search=few), "--json")
    assert status == 0, printed
    found = json.loads(printed)
    assert found["forecast"]["evaluations"] == 6
    assert found["forecast"]["all_items"] == 6 * 12 + 6 * 12  # base, parents, uniform, coefficient and best held out
    assert found["forecast"]["measured"] is None
    assert [model["name"] for model in found["models"]] == ["base", "one", "two"]
    assert {gene["name"] for gene in found["genes"]} >= {"one/0-0/weight", "two/1-1/weight"}
    assert [*found["geometry"][0]["norms"]] == ["one", "two"]
    assert {"model", "what", "remedy"} == found["warnings"][0].keys()
    assert found["prompt"] == []  # so few evaluations leave none for the LLM
    assert [use["kind"] for use in found["uses"]] == ["runs"]


def test_the_code_files_and_servers_of_a_config_are_shown(workspace: Workspace) -> None:
    (workspace.root / "tasks" / "own.yaml").write_text("task: own\nprocess_results: !function code.run\n")
    llm = {"proposer": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "m"}
    status, printed = workspace.llmevo("inspect", workspace.config(llm=llm, loggers=["tensorboard"]))
    assert status == 0, printed
    for part in (
        "runs the Python functions of own.yaml",
        "sends prompts to http://127.0.0.1:9/v1 (llm), with no key of the environment",
        "sends scores and recipes to tensorboard",
    ):
        assert part in printed


@pytest.mark.parametrize(
    ("variable", "words", "key"),
    [("key", (), "OPENAI_API_KEY"), ("", ("--api-key", "key"), "--api-key"), ("", (), "")],
)
def test_the_server_that_a_run_asks_is_shown_though_the_config_names_none(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, variable: str, words: tuple[str, ...], key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", variable)
    status, printed = workspace.llmevo(
        "inspect", workspace.config(search={"optimizer": "llm"}, llm={"proposer": "auto"}), *words
    )
    assert status == 0, printed
    assert ("sends prompts" in printed) is bool(key)
    assert f"sends prompts to OpenAI's server, or that of OPENAI_BASE_URL (llm), with {key}" in printed or not key


def test_an_llm_is_promised_only_where_the_budget_leaves_room_for_it(workspace: Workspace) -> None:
    """A base model has 16 % of the evaluations at first: none of the first two, and one of the next three."""
    for optimizer, budget in (("llm", 4), ("llm", 6), ("llm-evo-merge", 4)):
        given = workspace.config(search={"optimizer": optimizer, "budget": budget, "population": 3})
        status, printed = workspace.llmevo("inspect", given)
        assert status == 0, printed
        said = " ".join(printed.split())
        assert "the LLM will not be asked: 4 of the" in said
        assert ("optimizer: llm-off" in said) is (optimizer == "llm")
        assert "The LLM is asked" not in said
        assert "First prompt" not in said
        assert "the LLM will not be asked" in " ".join(
            workspace.llmevo("run", given, "--out", f"{optimizer}-{budget}")[1].split()
        )
        assert not workspace.state(f"{optimizer}-{budget}").prompted
    given = workspace.config(search={"optimizer": "llm", "budget": 20, "population": 3})
    printed = " ".join(workspace.llmevo("inspect", given)[1].split())
    assert "the LLM will not be asked" not in printed
    assert "The LLM is asked up to 4 times" in printed  # of six generations not in the first two
    server = {"proposer": "openai", "model": "some", "base_url": "http://127.0.0.1:9"}
    given = workspace.config(llm=server, search={"optimizer": "llm", "budget": 20, "population": 6})
    printed = " ".join(workspace.llmevo("inspect", given)[1].split())
    assert "then 6 generations of 3" in printed
    assert "The LLM is asked up to 7 times" in printed  # a chat model also before anything is scored
    assert "No recipe is scored yet" in printed


@pytest.mark.parametrize(
    ("price", "said"),
    [
        (None, "cost unknown without llm.price"),
        ({"prompt": 1e3}, "cost 3.00 at the config's prices"),
        ({"prompt": 0}, "cost 0.00 at the config's prices"),
    ],
)
def test_no_cost_is_shown_where_no_price_is_known(
    workspace: Workspace, price: dict[str, float] | None, said: str
) -> None:
    llm = {
        "proposer": "openai",
        "model": "some",
        "base_url": "http://127.0.0.1:9",
        **({"price": price} if price else {}),
    }
    given = workspace.config(llm=llm, search={"optimizer": "llm", "budget": 20})
    printed = " ".join(workspace.llmevo("inspect", given)[1].split())
    assert said.split(" 3.00")[0] in printed
    assert ("at the config's prices" in printed) is bool(price)


def test_what_becomes_of_every_tensor_is_counted(workspace: Workspace) -> None:
    status, printed = workspace.llmevo("inspect", workspace.config())
    assert status == 0, printed
    assert "Tensors of a candidate: 20 merged, 0 copied, 0 left out." in printed


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", None, "there is no tokenizer (tokenizer.json, tokenizer.model, vocab.json)"),
        ("tokenizer.json", "{", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", "[]", "tokenizer.json holds a JSON list, not an object"),
        ("tokenizer.json", "{}", "transformers cannot load its tokenizer"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds a JSON list, not an object"),
        ("config.json", None, "config.json is missing; base must be a folder that transformers has saved"),
        ("config.json", "", "config.json is empty"),
        ("config.json", "[]", "config.json holds a JSON list, not an object"),
        ("config.json", "{}", "base: config.json names no number of layers"),
        ("config.json", '{"text_config": {}}', "transformers makes no language model of its config.json"),
        (
            "config.json",
            '{"model_type": "llama", "num_hidden_layers": 2, "max_position_embeddings": "long"}',
            "transformers makes no language model of its config.json (StrictDataclassFieldValidationError: Validation"
            " error for field 'max_position_embeddings'",
        ),
    ],
)
@pytest.mark.parametrize("words", [("inspect",), ("run", "--dry-run")])
def test_a_broken_file_of_the_base_is_named(
    words: tuple[str, ...], file: str, content: str | None, said: str, workspace: Workspace
) -> None:
    broken = workspace.root / "base" / file
    broken.unlink() if content is None else broken.write_text(content)
    status, printed = workspace.llmevo(words[0], workspace.config(), *words[1:])
    assert status == 2
    assert said in printed
    assert len(printed.splitlines()) == 1


def test_measuring_scores_one_candidate_and_the_forecast_follows_from_it(workspace: Workspace) -> None:
    config = workspace.config(search={"optimizer": "random", "budget": 5}, engine={"self_check": False})
    status, printed = workspace.llmevo("inspect", config, "--measure", "--json")
    assert status == 0, printed
    found = json.loads(printed)["forecast"]
    measured = found["measured"]
    assert measured["items"] == 12
    each = measured["merge"] + measured["evaluate"]
    assert found["seconds"] == pytest.approx((5 + 6) * each)  # six rows are held out, of twelve questions as well
    status, printed = workspace.llmevo("inspect", config, "--measure")
    assert "by one candidate that was merged in" in printed


def test_a_forecast_keeps_to_minutes(workspace: Workspace) -> None:
    experiment = Experiment(read_config(workspace.config(heldout=None), {"search.budget": "50, 2 min"}), workspace.root)
    ahead = forecast(experiment, None, Measured(merge=1.0, evaluate=9.0, items=12))
    assert (ahead.evaluations, ahead.generations, ahead.seconds) == (12, 3, 120.0)


def ahead_of(workspace: Workspace, **changes: Any) -> Forecast:
    """The forecast of 20 s a candidate, and 20 s a held-out row."""
    config = read_config(workspace.config(**changes))
    return forecast(Experiment(config, workspace.root), None, Measured(merge=2.0, evaluate=18.0, items=12))


SIX = {"optimizer": "cma-es", "budget": 4 + 2 * 6, "population": 6, "finalists": 0}


@pytest.mark.parametrize(
    ("workers", "order", "waves"),
    [
        (1, "strict", 4 + 12 + 6),
        (2, "strict", 1 + 2 + 2 * 3 + 3),  # the first start row, three more, two generations, six held-out rows
        (4, "strict", 1 + 1 + 2 * 2 + 2),
        (6, "strict", 1 + 1 + 2 * 1 + 1),
        (8, "strict", 1 + 1 + 2 + 1),  # the last generation has what is left: four
        (4, "steady", 1 + 1 + 3 + 2),
    ],
)
def test_with_workers_a_generation_takes_as_long_as_its_waves(
    workspace: Workspace, workers: int, order: str, waves: int
) -> None:
    ahead = ahead_of(workspace, search={**SIX, "order": order}, engine={"workers": workers})
    assert (ahead.start_rows, ahead.evaluations, ahead.workers) == (4, 16, workers)
    assert ahead.seconds == pytest.approx(20.0 * waves)


def test_finalists_and_the_best_are_scored_once_more_as_they_are_served(workspace: Workspace) -> None:
    plain = ahead_of(workspace, limit=8)
    served = ahead_of(workspace, limit=8, engine={"quantize": "q4_0"})
    finalists = 4 + 3  # the best, with the best parent, the uniform merge and the best coefficient
    assert served.all_items == plain.all_items + finalists * 12 + 12
    assert served.seconds > plain.seconds
    everything = ahead_of(workspace, limit=8, engine={"quantize": "q4_0", "quantize_at": "all"})
    assert everything.all_items == plain.all_items + 12


def test_the_error_of_the_held_out_score_takes_repeated_questions_for_one_answer(workspace: Workspace) -> None:
    file = workspace.root / "tasks" / "letters_heldout.jsonl"
    once = ahead_of(workspace).heldout_error
    file.write_text(file.read_text() * 2)
    twice = ahead_of(workspace)
    assert (twice.heldout_items, twice.heldout_error) == (24, pytest.approx(once))


def test_finalists_answer_the_selection_questions_besides(workspace: Workspace) -> None:
    ahead, finalists, rows = ahead_of(workspace, limit=8), 4 + 3, 6
    assert (ahead.items, ahead.selection_items, ahead.heldout_items) == (8, 4, 12)
    assert ahead.all_items == ahead.evaluations * 8 + finalists * 4 + rows * 12
    each, final, last = (2.0 + 18.0 * asked / 8 for asked in (8, 4, 12))
    assert ahead.seconds == pytest.approx(ahead.evaluations * each + finalists * final + rows * last)


def test_with_workers_more_candidates_fit_into_minutes(workspace: Workspace) -> None:
    search = {**SIX, "budget": "4 min"}
    alone, three = (ahead_of(workspace, search=search, engine={"workers": count}) for count in (1, 3))
    assert alone.evaluations == 12
    assert three.evaluations == 4 + (12 - 2) * 3


def test_the_forecast_names_the_workers_and_counts_the_memory_of_all(workspace: Workspace) -> None:
    config = workspace.config(search=SIX)
    texts = [
        workspace.llmevo("inspect", config, "--workers", count, *form) for count in (1, 3) for form in ((), ("--json",))
    ]
    assert [status for status, _ in texts] == [0] * 4
    assert "with 3 workers: an estimate" in texts[2][1]
    assert "workers" not in texts[0][1].partition("Warnings")[0]
    one, three = (json.loads(text)["memory"] for _, text in (texts[1], texts[3]))
    for kind in ("engine", "caches", "disk"):
        assert three[kind] == 3 * one[kind]


def test_a_heat_map_is_warm_where_values_are_high() -> None:
    styles = [str(cell(value, 2.0).style) for value in (-1.0, 0.0, 1.0, 2.0)]
    assert styles[0] == styles[1]
    assert len({*styles}) == 3
    console = Console(width=60)
    with console.capture() as capture:
        console.print(heatmap(["0-4", "5-9"], {"a": [0.25, 1.0], "b": [0.5, 0.125]}, percent=True))
    lines = capture.get().splitlines()
    assert [line.split() for line in lines] == [["a", "b"], ["0-4", "25.0%", "50.0%"], ["5-9", "100.0%", "12.5%"]]
