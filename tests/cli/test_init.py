"""`llmevo init`: a config for the models and questions of a user."""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from llmevo.config import read_config
from llmevo.errors import TaskError
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.tasks import listing
from llmevo.evaluation.tasks.listing import ListedTask
from llmevo.evaluation.tasks.task import AskingOptions, Task
from llmevo.run.draft import own_task
from support.workspace import Workspace

WORDS = ["red", "green", "blue", "black"]


def questions(file: str, kind: str = "place", count: int = 60) -> Path:
    """Write a file of questions; `kind` says how it gives the answers."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        row: dict[str, Any] = {"question": f"Which colour has number {number}?"}
        right = number % len(WORDS)
        match kind:
            case "place":
                row |= {"choices": WORDS, "answer": right}
            case "text":
                row |= {"choices": WORDS, "answer": WORDS[right]}
            case _:
                row |= {"target": WORDS[right]}
        rows.append(row)
    Path(file).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return Path(file)


def test_the_config_for_own_models_and_questions_runs(workspace: Workspace) -> None:
    shutil.rmtree("tasks")
    Path("data").mkdir()
    for kind in ("place", "text", "target"):
        questions(f"data/{kind}.jsonl", kind)
    files = [word for kind in ("place", "text", "target") for word in ("--task", f"data/{kind}.jsonl")]
    status, printed = workspace.llmevo("init", "one", "two", "--base", "base", *files, "--preset", "quick")
    assert status == 0, printed
    config = read_config(Path("config.yml"))
    assert ([*map(str, config.genome.models)], str(config.genome.base_model)) == (["one", "two"], "base")
    assert (config.genome.layer_granularity, config.search.budget.evaluations, config.limit) == (0, 20, 50)
    assert [task.weight for task in config.tasks] == pytest.approx([1 / 3] * 3, abs=1e-4)
    assert config.apply_chat_template
    line, file = Path("config.yml").read_text().splitlines()[0].split("=")
    assert line == "# yaml-language-server: $schema"
    assert Path(file).read_text() == (Path(__file__).parents[2] / "docs" / "schemas" / "config.json").read_text()
    status, printed = workspace.llmevo(
        "run",
        "config.yml",
        "--out",
        "run",
        "--set",
        "search.budget=4",
        "--set",
        "limit=4",
        "--set",
        "search.finalists=0",
    )
    assert status == 0, printed
    assert workspace.state("run").heldout["best"].items


@pytest.mark.parametrize(
    ("tasks", "pairs"),
    [
        (["red"], {"one": ["red"], "two": ["TASK"]}),
        (["red", "blue"], {"one": ["red"], "two": ["blue"]}),
        (["red", "blue", "green"], {"one": ["red", "green"], "two": ["blue"]}),
    ],
)
def test_a_comment_has_the_preparation_for_models_whose_tasks_are_known(
    workspace: Workspace, tasks: Sequence[str], pairs: dict[str, list[str]]
) -> None:
    words = [word for name in tasks for word in ("--task", str(questions(f"{name}.jsonl")))]
    assert workspace.llmevo("init", "one", "two", "--base", "base", *words)[0] == 0
    text = Path("config.yml").read_text()
    assert read_config(Path("config.yml")).genome.prepare is None
    genome = yaml.safe_load(text.replace("# prepare:", "prepare:"))["genome"]
    assert genome["prepare"] == {"steps": ["regmean"], "tasks": pairs}


@pytest.mark.parametrize("words", [("one", "two"), ("base", "one", "--base", "base")], ids=str)
def test_models_without_a_base_or_another_expert_get_no_such_comment(
    workspace: Workspace, words: Sequence[str]
) -> None:
    questions("colours.jsonl")
    assert workspace.llmevo("init", *words, "--task", "colours.jsonl")[0] == 0
    assert "prepare" not in Path("config.yml").read_text()


def test_paths_are_those_of_the_config(workspace: Workspace) -> None:
    questions("colours.jsonl")
    assert workspace.llmevo("init", "one", "two", "--task", "colours.jsonl", "--out", "configs/my.yml")[0] == 0
    values = yaml.safe_load(Path("configs/my.yml").read_text())
    assert values["genome"]["models"] == ["../one", "../two"]
    assert values["genome"]["merge_method"] == "linear"
    assert values["task_search_path"] == [".."]


def test_questions_of_a_model_without_a_chat_template_are_not_asked_as_a_chat(workspace: Workspace) -> None:
    questions("colours.jsonl")
    config = Path("base/tokenizer_config.json")
    kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "chat_template"}
    config.write_text(json.dumps(kept))
    Path("base/chat_template.jinja").unlink(missing_ok=True)
    assert workspace.llmevo("init", "one", "two", "--base", "base", "--task", "colours.jsonl")[0] == 0
    assert not read_config(Path("config.yml")).apply_chat_template


def test_the_base_is_that_of_the_adapters_or_cards(workspace: Workspace) -> None:
    questions("colours.jsonl")
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(name, "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/model"}))
    assert workspace.llmevo("init", "a", "b", "--task", "colours.jsonl", "--out", "adapters.yml")[0] == 0
    config = read_config(Path("adapters.yml"))
    assert str(config.genome.base_model) == "owner/model"
    assert [*map(str, config.genome.models)] == ["owner/model+a", "owner/model+b"]
    for name in ("one", "two"):
        Path(name, "README.md").write_text("---\nbase_model: [owner/other]\n---\nA model.\n")
    assert workspace.llmevo("init", "one", "two", "--task", "colours.jsonl", "--out", "cards.yml")[0] == 0
    assert str(read_config(Path("cards.yml")).genome.base_model) == "owner/other"


def listed(name: str, train: bool) -> ListedTask:
    splits: dict[str, int | None] = {"test": None, **({"train": None} if train else {})}
    return ListedTask(
        name,
        "multiple_choice",
        ["acc,none", "acc_norm,none"],
        splits,
        "test",
        "data/set",
        f"{name}_train" if train else None,
        "train" if train else None,
    )


def test_a_benchmark_is_searched_on_its_training_split(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [listed("arc", True), listed("exam", False)]

    def list_tasks(*_: object, **__: object) -> Sequence[ListedTask]:
        return known

    monkeypatch.setattr(listing, "list_tasks", list_tasks)
    models = ("owner/one", "owner/two", "--base", "owner/base")
    assert workspace.llmevo("init", *models, "--task", "arc")[0] == 0
    config = read_config(Path("config.yml"))
    assert ([task.name for task in config.tasks], [task.name for task in config.heldout]) == (["arc_train"], ["arc"])
    assert config.tasks[0].metric == "acc,none"
    status, printed = workspace.llmevo("init", *models, "--task", "exam", "--out", "b.yml")
    assert status == 2
    assert "--task exam: it has a test split only" in printed
    assert workspace.llmevo("init", *models, "--task", "arc_train", "--heldout", "exam", "--out", "b.yml")[0] == 0
    assert [task.name for task in read_config(Path("b.yml")).heldout] == ["exam"]
    status, printed = workspace.llmevo("init", *models, "--task", "arcs", "--out", "c.yml")
    assert status == 2
    assert "did you mean 'arc'?" in printed


def test_held_out_benchmarks_have_the_weights_of_their_tasks(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def list_tasks(*_: object, **__: object) -> Sequence[ListedTask]:
        return [listed("arc", True), listed("book", True)]

    monkeypatch.setattr(listing, "list_tasks", list_tasks)
    words = ("owner/one", "owner/two", "--base", "owner/base", "--task", "arc", "--task", "book")
    assert workspace.llmevo("init", *words)[0] == 0
    config = read_config(Path("config.yml"))
    assert [task.weight for task in (*config.tasks, *config.heldout)] == [0.5] * 4


def test_a_file_of_another_kind_is_no_misspelt_task(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def list_tasks(*_: object, **__: object) -> Sequence[ListedTask]:
        return [listed("arc", True)]

    monkeypatch.setattr(listing, "list_tasks", list_tasks)
    Path("mine.csv").write_text("question,answer\na,b\n")
    status, printed = workspace.llmevo("init", "one", "two", "--task", "mine.csv")
    assert status == 2
    assert "--task mine.csv: only questions in JSON Lines are read" in printed
    assert "there is no such task" not in printed


def test_a_file_of_questions_may_be_held_out(workspace: Workspace) -> None:
    shutil.rmtree("tasks")
    Path("later").mkdir()
    words = ("--task", questions("colours.jsonl"), "--heldout", questions("later/shades.jsonl", "target"))
    assert workspace.llmevo("init", "one", "two", "--base", "base", *words)[0] == 0
    values = yaml.safe_load(Path("config.yml").read_text())
    assert values["tasks"] == [{"name": "colours", "metric": "acc,none"}]
    assert values["heldout"] == [{"name": "shades", "metric": "exact_match,none"}]
    assert values["task_search_path"] == [".", "later"]
    assert Path("later/shades.yaml").exists()
    assert "split" not in values


def test_a_folder_that_cannot_be_made_is_one_line(workspace: Workspace) -> None:
    Path("file").write_text("")
    words = ("--task", questions("colours.jsonl"), "--out", "file/config.yml")
    status, printed = workspace.llmevo("init", "one", "two", "--base", "base", *words)
    assert (status, "file cannot be made" in printed, "Traceback" in printed) == (2, True, False), printed


def test_repeated_questions_are_counted(workspace: Workspace) -> None:
    rows = questions("colours.jsonl", count=58).read_text().splitlines()
    Path("colours.jsonl").write_text("\n".join((rows * 2)[:100]) + "\n")
    status, printed = workspace.llmevo("init", "one", "two", "--task", "colours.jsonl")
    assert status == 0
    assert "! 42 of the 100 questions of colours.jsonl are repeated" in printed


def test_too_few_different_questions_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n' * 100)
    with pytest.raises(TaskError, match=r"99 of the 100 questions of .* are repeated; .* at least 40 different ones"):
        own_task(file)


def test_what_is_missing_is_asked_in_a_terminal(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    questions("colours.jsonl")
    answers = iter(["one two", "base", "colours.jsonl", "gpt-x", "thorough"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)

    def prompt(*_: object, **__: object) -> str:
        return next(answers)

    monkeypatch.setattr(typer, "prompt", prompt)
    assert workspace.llmevo("init")[0] == 0
    config = read_config(Path("config.yml"))
    assert (str(config.genome.base_model), config.llm.model, config.search.budget.evaluations) == ("base", "gpt-x", 150)
    assert next(answers, None) is None


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "MODEL… is missing: models to merge"),
        (("one", "two"), "--task is missing: tasks of lm-eval, or files with questions (.jsonl)"),
        (("one",), "give two models or more to merge, or one and --base; got one"),
        (("one", "nowhere"), "nowhere: there is no such folder, and it is no id of the hub, OWNER/NAME"),
        (("one", "two", "--preset", "fast"), "--preset: 'fast' is unknown; give one of quick, standard, thorough"),
        (("one", "two", "--task", "nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
        (("one", "two", "--out", "exists.yml"), "exists.yml exists; name another file with --out"),
        (("one", "two", "--heldout", "a", "--heldout", "b"), "--heldout: give one for each --task, 1 and not 2"),
    ],
)
def test_what_cannot_be_used_is_named(workspace: Workspace, words: Sequence[str], reason: str) -> None:
    questions("colours.jsonl")
    Path("exists.yml").write_text("")
    needs_task = "--task is missing" not in reason and "--task" not in words
    task = ("--task", "colours.jsonl") if needs_task else ()
    out = () if "--out" in words else ("--out", "new.yml")
    status, printed = workspace.llmevo("init", *words, *task, *out)
    assert status == 2, printed
    assert reason in printed
    assert not Path("new.yml").exists()
    assert not Path("colours.yaml").exists()


@pytest.mark.parametrize("kind", ["place", "text", "list"])
def test_questions_and_answers_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(40):
        row: dict[str, Any] = {"question": f"first {number}\u2028second\x85third", "choices": ["a b", "[2]"]}
        match kind:
            case "place":
                row["answer"] = 1
            case "text":
                row["answer"] = "[2]"
            case _:
                row = {"question": row["question"], "answer": "[2]"}
        rows.append(row)
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    task = own_task(file)
    assert task.file
    task.file.write_text(task.description)
    loaded = Task(name="mine", metric=task.metric)
    asked = Evaluator([loaded], AskingOptions(apply_chat_template=False), [tmp_path], tmp_path).texts()["mine"]
    assert asked == [(f"{row['question']}\nAnswer:", "[2]") for row in rows]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 1: it is no JSON"),
        ("[1]", "line 1: it is no object"),
        ('{"text": "a"}', "its columns are text; a question is one of question, prompt"),
        ('{"question": "a", "answer": ""}', "line 1: 'answer' is missing or empty"),
        ('{"question": "a", "choices": "ab", "answer": "a"}', "line 1: choices is no list but 'ab'"),
        ('{"question": "a", "choices": ["a"], "answer": 1}', "line 1: answer is 1; give the place of the right choice"),
        (
            '{"question": "a", "choices": [1, 2], "answer": 1}',
            "line 1: choices are not all texts: [1, 2]; write them in",
        ),
        ('\ufeff{"question": "a", "answer": "b"}', "it begins with a byte order mark"),
        (
            '{"question": "a", "choices": ["a"], "answer": 0}\n{"question": "b", "choices": ["a"], "answer": "a"}',
            "line 2: answer is 'a', and in the first line 0; write all as texts or none",
        ),
        ('{"question": "a", "choices": ["a"], "answer": "b"}', "line 1: answer is 'b'; give the place"),
    ],
)
def test_questions_that_cannot_be_read_are_named(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(f"{line}\n" * 60)
    with pytest.raises(TaskError) as caught:
        own_task(file)
    assert f"{file}" in str(caught.value)
    assert reason in str(caught.value)
    file.write_text('{"question": "a", "answer": "b"}\n' * 3)
    with pytest.raises(TaskError, match="it has 3 questions; a search and a held-out score need at least 40"):
        own_task(file)


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("2024-01-{:02d}", "2024-01-{:02d}"),  # `datasets` reads these as times
        (" a{} ", "a{}"),
        ("a{}\n", "a{}"),
        ("First a{}\n\nSecond", "First a{}\n\nSecond"),
    ],
)
def test_a_model_that_writes_the_answers_has_all_right(tmp_path: Path, given: str, right: str) -> None:
    file = tmp_path / "mine.jsonl"
    places = range(1, 31)
    rows = [{"question": f"q{place}-{half}", "answer": given.format(place)} for place in places for half in (0, 1)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = own_task(file)
    assert task.file
    task.file.write_text(task.description)
    asked = Evaluator([Task(name="mine", metric=task.metric)], AskingOptions(apply_chat_template=False), [tmp_path])
    assert [answer for _, answer in asked.texts()["mine"]] == [right.format(place) for place in places for _ in (0, 1)]
    (stop,) = yaml.safe_load(task.description)["generation_kwargs"]["until"]
    assert stop not in right


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"question": "a", "answer": 1}, {"question": "b", "answer": 0.5}], "line 2: answer is 0.5, and in the first"),
        ([{"question": "a", "answer": "2024-01-02 10:00"}], "answer are times, such as '2024-01-02 10:00'"),
        (
            [{"question": "a", "choices": ["2024-01-02", "2024-01-03"], "answer": 0}],
            "choices are times, such as '2024-01-02'",
        ),
    ],
)
def test_answers_that_datasets_would_change_are_refused(tmp_path: Path, rows: list[Any], reason: str) -> None:
    file = tmp_path / "mine.jsonl"
    every = [{**row, "question": f"{row['question']}{place}"} for place in range(60) for row in rows]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in every))
    with pytest.raises(TaskError, match=re.escape(reason)):
        own_task(file)


@pytest.mark.parametrize("name", ["my [v2]", "a,b", "123", "null", "{x}"])
def test_a_files_name_may_look_like_yaml(workspace: Workspace, name: str) -> None:
    questions(f"{name}.jsonl")
    status, printed = workspace.llmevo("init", "one", "two", "--base", "base", "--task", f"{name}.jsonl")
    assert status == 0, printed
    assert [task.name for task in read_config(Path("config.yml")).tasks] == [name.replace(" ", "_")]


def test_what_init_cannot_do_with_two_tasks_of_a_name_or_half_an_llm_is_refused(workspace: Workspace) -> None:
    questions("q.jsonl")
    Path("other").mkdir()
    questions("other/q.jsonl")
    one = ("init", "one", "two", "--base", "base", "--task", "q.jsonl")
    for words, reason in (
        (("--task", "q.jsonl"), "--task q.jsonl: it is given twice; leave one out"),
        (("--heldout", "q.jsonl"), "--task q.jsonl: it is given twice; leave one out"),
        (("--task", "other/q.jsonl"), "--task other/q.jsonl: q.jsonl makes a task q too; rename one of the files"),
        (("--base-url", "http://localhost:1/v1"), "--base-url http://localhost:1/v1: give --model too"),
    ):
        status, printed = workspace.llmevo(*one, *words)
        assert status == 2, printed
        assert reason in printed
    Path("q.yaml").write_bytes(b"\xff")
    status, printed = workspace.llmevo(*one)
    assert status == 2, printed
    assert "q.yaml exists and describes another task" in printed
    assert not Path("config.yml").exists()
