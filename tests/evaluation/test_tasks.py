"""Tasks on their training split, public benchmarks, and the list of what there is."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

import llmevo
from llmevo.config import read_config
from llmevo.engines.scoring.hf import HfScorer
from llmevo.errors import TaskError
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.tasks.files import BUILT_IN, is_training, leaves, refuse_benchmarks, training_changes
from llmevo.evaluation.tasks.listing import list_tasks
from llmevo.evaluation.tasks.task import AskingOptions, Task
from llmevo.run.experiment import config_of
from llmevo.run.scorer import Scorer
from llmevo.search.objectives.constraints import paired
from support.tasks import MULTIPLE_CHOICE, ROWS, asked
from support.tiny_model import tiny_llama, tiny_tokenizer
from support.workspace import Workspace

HUB = {**MULTIPLE_CHOICE, "dataset_path": "owner/benchmark"}


pytestmark = pytest.mark.usefixtures("cached")


def write(folder: Path, name: str, **config: Any) -> None:
    """A task file; `splits` are its questions."""
    splits: dict[str, list[dict[str, Any]]] = config.pop("splits", {})
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.{split}.jsonl").write_text(text)
    if splits:
        files = {split: str(folder / f"{name}.{split}.jsonl") for split in splits}
        config = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, **config}
    (folder / f"{name}.yaml").write_text(json.dumps({**MULTIPLE_CHOICE, "task": name, **config}))


def evaluator(folder: Path, *names: str, benchmarks: bool = True, **protocol: Any) -> Evaluator:
    tasks = [Task(name=name) for name in names]
    return Evaluator(tasks, AskingOptions(apply_chat_template=False, **protocol), [folder], folder, benchmarks)


def questions(rows: list[dict[str, Any]]) -> list[str]:
    return [row["question"] for row in rows]


# Where the data are


@pytest.mark.parametrize("files", ["test.jsonl", ["test.jsonl"], {"test": "data/*.jsonl"}, {"test": ["data/a.jsonl"]}])
@pytest.mark.parametrize("included", [False, True])
def test_data_beside_a_task_file_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Any, included: bool
) -> None:
    folder = tmp_path / "tasks"
    (folder / "data").mkdir(parents=True)
    for file in ("test.jsonl", "data/a.jsonl"):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    split = "test" if isinstance(files, dict) else "train"
    described = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": split}
    if included:
        (folder / "shared.yaml").write_text(json.dumps({**MULTIPLE_CHOICE, **described}))
        (folder / "sums.yaml").write_text(json.dumps({"include": "shared.yaml", "task": "sums"}))
    else:
        write(folder, "sums", **described)
    monkeypatch.chdir(tmp_path)
    assert asked(evaluator(folder, "sums")) == questions(ROWS[:3])
    (found,) = [task for task in list_tasks([folder], built_in=False) if task.name == "sums"]
    assert found.splits == {split: 3 if "*" not in str(files) else None}


def test_data_that_only_lie_in_the_current_folder_are_found_there_as_by_lm_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "here.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    described = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "here.jsonl"}}}
    write(tmp_path / "tasks", "sums", **described)
    monkeypatch.chdir(tmp_path)
    assert asked(evaluator(tmp_path / "tasks", "sums")) == questions(ROWS[:3])


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("test_split", {"test_split": "validation"}),
        ("validation_split", {"test_split": None, "validation_split": "validation"}),
        ("training_split", {"training_split": "validation"}),
        ("fewshot_config", {"fewshot_config": {"split": "validation"}}),
    ],
)
def test_a_split_that_the_data_do_not_have_is_named_with_those_they_have(
    tmp_path: Path, key: str, config: dict[str, Any]
) -> None:
    write(tmp_path, "sums", **config, splits={"train": ROWS[:3], "test": ROWS[3:6]})
    says = f"tasks: sums has no split 'validation', which its `{key}` names; its data have 'train', 'test'"
    with pytest.raises(TaskError, match=says):
        evaluator(tmp_path, "sums")


TEXTS = "task: sums\ndoc_to_text: x\ndoc_to_target: y\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: sums\n  bad: [\n", "sums.yaml cannot be read"),
        ("task: sums\ninclude: gone.yaml\n", "sums.yaml cannot be read .*gone.yaml"),
        ("task: sums\ndoc_to_txt: x\n", "unknown key 'doc_to_txt', did you mean 'doc_to_text'"),
        ("task: sums\ndoc_to_text: x\n", "sums: its file has no 'doc_to_target', which gives the right answer"),
        (f"{TEXTS}metric_list: [acc]\n", r"metric_list is \['acc'\]; write a list such as \[{metric: acc"),
        (f"{TEXTS}metric_list: {{metric: acc}}\n", "metric_list is {'metric': 'acc'}; write a list"),
        (f"{TEXTS}metric_list: [{{metric: acc, aggregation: meen}}]\n", "aggregation 'meen', did you mean 'mean'"),
        (f"{TEXTS}metric_list: [{{metric: exact_mach}}]\n", "metric 'exact_mach', did you mean 'exact_match'"),
        ("group: sums\ntask: [gone]\n", "sums lists the task 'gone', which does not exist"),
        ("group: sums\ntask: []\n", "sums is a group without tasks"),
    ],
)
def test_a_task_file_that_cannot_be_meant_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "sums.yaml").write_text(text)
    with pytest.raises(TaskError, match=says):
        evaluator(tmp_path, "sums")


# The training split


def test_a_task_is_asked_on_its_training_split(tmp_path: Path) -> None:
    write(tmp_path, "sums", splits={"test": ROWS[:4], "train": ROWS[4:12]}, training_split="train")
    scoring = evaluator(tmp_path, "sums_train", benchmarks=False)
    assert asked(scoring) == questions(ROWS[4:12])
    score = scoring.score(HfScorer(tiny_llama(), tiny_tokenizer()))
    assert [*score.tasks] == [*score.item_scores] == ["sums_train"]
    both = evaluator(tmp_path, "sums", "sums_train")
    assert asked(both) == questions(ROWS[:12])


def test_without_a_training_split_it_is_the_validation_split_beside_a_scored_test_split(tmp_path: Path) -> None:
    write(tmp_path, "sums", splits={"test": ROWS[:4], "dev": ROWS[4:9]}, validation_split="dev")
    assert asked(evaluator(tmp_path, "sums_train")) == questions(ROWS[4:9])
    write(tmp_path, "bare", splits={"dev": ROWS[:4]}, validation_split="dev", test_split=None)
    with pytest.raises(TaskError, match=r"bare_train: bare has no split beside 'dev'.*--trainable"):
        evaluator(tmp_path, "bare_train")


def test_a_task_of_that_name_comes_first_and_a_group_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "sums", splits={"test": ROWS[:4], "train": ROWS[4:12]}, training_split="train")
    write(tmp_path, "sums_train", splits={"test": ROWS[12:]})
    assert asked(evaluator(tmp_path, "sums_train")) == questions(ROWS[12:])
    (tmp_path / "group.yaml").write_text(json.dumps({"group": "maths", "task": ["sums"]}))
    with pytest.raises(TaskError, match=r"maths is a group.*list sums_train"):
        evaluator(tmp_path, "maths_train")


@pytest.mark.parametrize("third", [True, False])
def test_a_question_is_never_its_own_example(tmp_path: Path, third: bool) -> None:
    splits = {"test": ROWS[:4], "train": ROWS[4:9], **({"dev": ROWS[12:16]} if third else {})}
    more = {"validation_split": "dev"} if third else {}
    write(tmp_path, "sums", splits=splits, training_split="train", **more)
    scoring = evaluator(tmp_path, "sums_train", num_fewshot=3)
    lm: Any = HfScorer(tiny_llama(max_position_embeddings=256), tiny_tokenizer())
    prompts: list[str] = []

    class Watched(HfScorer):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            prompts.extend(request.args[0] for request in requests)
            return super().loglikelihood(requests, disable_tqdm)

    scoring.score(Watched(lm.model, lm.tokenizer))
    assert {prompt.split("\n\n")[-1] for prompt in prompts} == set(questions(ROWS[4:9]))
    for prompt in prompts:
        *examples, question = prompt.split("\n\n")
        assert len(examples) == 3
        shown = [text for text in questions(ROWS) if any(example.startswith(text) for example in examples)]
        assert question not in shown
        assert set(shown) <= set(questions(ROWS[12:16] if third else ROWS[4:9]))


def built_in(folder: str) -> Any:
    """lm-eval's own tasks of one of its folders."""
    return TaskManager(include_path=str(BUILT_IN / folder), include_defaults=False).task_index


def test_the_splits_of_lm_evals_own_tasks() -> None:
    hellaswag, arc = built_in("hellaswag")["hellaswag"].cfg, built_in("arc")["arc_easy"].cfg
    changes = {"task": "h", "test_split": "train", "fewshot_split": "train"}
    assert training_changes("h", "hellaswag", hellaswag) == changes
    changes = {"task": "a", "test_split": "train", "fewshot_split": "validation"}
    assert training_changes("a", "arc_easy", arc) == changes


# Public benchmarks


@pytest.mark.parametrize(
    ("folder", "name", "says"),
    [
        ("hellaswag", "hellaswag", "'validation' of Rowan/hellaswag.*hellaswag_train, its split 'train'"),
        ("arc", "arc_easy", r"'test' of allenai/ai2_arc \(ARC-Easy\).*arc_easy_train.*allow_benchmark_tasks: true"),
        ("blimp", "blimp_causative", "'train' of nyu-mll/blimp.*no other split: search on a task of your own"),
        ("arc", "ai2_arc", r"ai2_arc \(its task arc_challenge\) is a public benchmark"),
    ],
)
def test_lm_evals_own_tasks_are_public(folder: str, name: str, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        refuse_benchmarks([name], built_in(folder))


def test_a_hub_data_set_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "bench", **{**HUB, "training_split": "train"})
    monkeypatch.setattr("datasets.load_dataset", None)
    with pytest.raises(TaskError, match=r"bench is a public.*'test' of owner/benchmark.*bench_train.*heldout"):
        evaluator(tmp_path, "bench", benchmarks=False)
    write(tmp_path, "hidden", **{**HUB, "validation_split": "validation", "test_split": None})
    with pytest.raises(TaskError, match=r"'validation' of owner/benchmark.*no other split"):
        evaluator(tmp_path, "hidden", benchmarks=False)
    files = {"data_files": {"test": "https://example.org/test.jsonl"}}
    write(tmp_path, "far", **{**HUB, "dataset_path": "json", "dataset_kwargs": files})
    with pytest.raises(TaskError, match=r"far is a public.*https://example.org/test.jsonl"):
        evaluator(tmp_path, "far", benchmarks=False)


def test_what_may_be_searched_on_gets_to_its_data(tmp_path: Path) -> None:
    write(tmp_path, "bench", **{**HUB, "training_split": "train"})
    write(tmp_path, "mine", **{**HUB, "test_split": "train[:500]"})
    for name, benchmarks in (("bench", True), ("bench_train", False), ("mine", False)):
        with pytest.raises(TaskError, match=f"{name} cannot be loaded"):  # there is no hub here
            evaluator(tmp_path, name, benchmarks=benchmarks)
    write(tmp_path, "local", splits={"test": ROWS[:4]})
    assert evaluator(tmp_path, "local", benchmarks=False).items == 4


def test_a_function_on_a_benchmarks_questions_is_refused_too(tmp_path: Path) -> None:
    write(tmp_path, "bench", **{**HUB, "output_type": "generate_until"})
    (tmp_path / "metrics.py").write_text("def length(document, reply):\n    return len(reply)\n")
    task = Task(name="length", function="metrics.py:length", questions="bench")
    with pytest.raises(TaskError, match="bench is a public benchmark"):
        Evaluator([task], AskingOptions(), [tmp_path], tmp_path, benchmarks=False)


def test_a_group_is_seen_through(tmp_path: Path) -> None:
    write(tmp_path, "bench", **HUB)
    write(tmp_path, "tagged", splits={"test": ROWS[:4]}, tag="some")
    members: list[Any] = ["tagged", {"task": "bench", "test_split": "train"}, {"group": "inner", "task": ["bench"]}]
    (tmp_path / "group.yaml").write_text(json.dumps({"group": "all", "task": members, "num_fewshot": 2}))
    index = TaskManager(include_path=str(tmp_path), include_defaults=False).task_index
    found = [(name, config["test_split"], config.get("num_fewshot")) for name, config in leaves("all", index)]
    assert found == [("tagged", "test", 2), ("bench", "train", 2), ("bench", "test", 2)]
    assert [name for name, _ in leaves("some", index)] == ["tagged"]
    with pytest.raises(TaskError, match=r"all \(its task bench\)"):
        refuse_benchmarks(["all"], index)


@pytest.mark.parametrize(
    ("split", "training"),
    [
        ("train", True),
        ("train[:500]", True),
        ("auxiliary_train", True),
        ("train_sft", True),
        ("train+test", False),
        ("test", False),
        ("constrained", False),
        (None, False),
    ],
)
def test_a_split_to_train_on_is_known_by_its_name(split: str | None, training: bool) -> None:
    assert is_training(split) is training


def test_a_config_that_names_a_benchmark_says_so_itself(workspace: Workspace) -> None:
    write(workspace.root / "tasks", "bench", **{**HUB, "training_split": "train"})
    status, printed = workspace.llmevo("run", workspace.config(tasks=["bench"]), "--out", "run")
    assert status == 2
    assert "bench is a public benchmark" in printed
    assert "`allow_benchmark_tasks: true`" in printed
    for changes in ({"tasks": ["bench"], "allow_benchmark_tasks": True}, {"heldout": ["bench"]}):
        scorer = Scorer(read_config(workspace.config(**changes)), workspace.root)
        with pytest.raises(TaskError, match="bench cannot be loaded"):
            _ = scorer.evaluators


def test_a_run_that_began_before_benchmarks_were_refused_goes_on(workspace: Workspace) -> None:
    now = read_config(workspace.config()).model_dump(mode="json")
    before = {key: value for key, value in now.items() if key != "allow_benchmark_tasks"}
    started: list[Any] = [SimpleNamespace(config=config, proposer=None) for config in (now, before)]
    assert [config_of(each, "log").allow_benchmark_tasks for each in started] == [False, True]


# The adapter

PRIVATE = {
    *("_aggregation_list", "_build_task", "_factory", "_filters", "_fewshot_docs", "_higher_is_better", "_instances"),
    *("_load_full_config", "_metric_fn_kwargs", "_metric_fn_list", "_training_docs"),
}
"""lm-eval's attributes that have no public name."""


def test_only_the_adapter_reads_private_names_of_lm_eval() -> None:
    package = Path(llmevo.__file__).parent
    for file in package.rglob("*.py"):
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute | ast.FunctionDef):
                names |= PRIVATE & {node.attr if isinstance(node, ast.Attribute) else node.name}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lm_eval."):
                names |= {name for name in (node.module or "").split(".") if name.startswith("_")}
                names |= {alias.name for alias in node.names if alias.name.startswith("_")}
        if file != package / "evaluation/tasks/lm_eval.py":
            assert not names, f"{file.name} names {names}"
        else:
            assert {"_factory", "_filters", "_instances"} <= names


# The list


@pytest.mark.parametrize(
    ("searched", "heldout", "pairs"),
    [
        (["a"], ["b"], {"a": "b"}),
        (["q_a_search", "q_b_search"], ["q_b_held", "q_a_held"], {"q_a_search": "q_a_held", "q_b_search": "q_b_held"}),
        (["arc_easy_train", "corpus"], ["arc_easy"], {"arc_easy_train": "arc_easy"}),
        (["sums", "corpus"], ["sums_held_out", "other"], {"sums": "sums_held_out"}),
        (["sums", "sums_long"], ["sums_long_test"], {"sums_long": "sums_long_test"}),
        (["arc", "corpus"], ["arc_easy"], {}),
    ],
)
def test_a_search_task_goes_with_its_held_out_one(
    searched: list[str], heldout: list[str], pairs: dict[str, str]
) -> None:
    assert paired(searched, heldout) == pairs


def test_tasks_are_listed_from_their_files(workspace: Workspace) -> None:
    folder = workspace.root / "tasks"
    write(folder, "bench", **{**HUB, "validation_split": "validation", "training_split": "train", "metric_list": None})
    found = {task.name: task for task in list_tasks([folder], built_in=False)}
    assert [*found] == ["bench", "letters", "letters_heldout"]
    assert found["letters"].splits == {"test": 12}
    assert (found["letters"].data, found["letters"].train) == (None, None)
    bench = found["bench"]
    assert (bench.output, bench.data, bench.scored) == ("multiple_choice", "owner/benchmark", "test")
    assert (bench.train, bench.train_split) == ("bench_train", "train")
    assert bench.splits == {"train": None, "validation": None, "test": None}
    assert bench.metrics == ["acc,none", "acc_norm,none"]

    status, printed = workspace.llmevo("tasks", "--task-search-path", folder, "--trainable", "--json")
    assert status == 0
    assert [task["train"] for task in json.loads(printed)] == ["bench_train"]
    status, printed = workspace.llmevo("tasks", workspace.config(), "--match", "letters*")
    assert status == 0
    assert "test* 12" in printed
    assert "bench" not in printed
    status, printed = workspace.llmevo("tasks", "--task-search-path", "nowhere")
    assert status == 2
    assert "nowhere" in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--match", "bench_train"), "bench_train is bench on its training split, 'train'; add --trainable"),
        (("--match", "leters"), "No task matches 'leters', did you mean 'letters'?; `llmevo tasks --built-in`"),
        (("--match", "letters*", "--trainable"), "No task that matches 'letters*' has a training split"),
    ],
    ids=str,
)
def test_a_pattern_that_matches_no_task_says_why(workspace: Workspace, options: tuple[str, ...], said: str) -> None:
    write(workspace.root / "tasks", "bench", **{**HUB, "training_split": "train"})
    status, printed = workspace.llmevo("tasks", "--task-search-path", "tasks", *options)
    assert status == 0
    assert said in printed


def test_the_name_of_a_training_split_is_matched_where_such_names_are_listed(workspace: Workspace) -> None:
    write(workspace.root / "tasks", "bench", **{**HUB, "training_split": "train"})
    words = ("--task-search-path", "tasks", "--trainable", "--match", "bench_train", "--json")
    assert [task["train"] for task in json.loads(workspace.llmevo("tasks", *words)[1])] == ["bench_train"]
