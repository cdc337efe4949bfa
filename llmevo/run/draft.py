"""The draft of a config for the models and questions that a user names; `llmevo init` writes it."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from llmevo.errors import SourceError, TaskError, UserError, shortened
from llmevo.evaluation.questions import repeated
from llmevo.evaluation.tasks.files import near
from llmevo.models.checkpoints import read_object
from llmevo.models.references import EXPERT, PACKAGE, ModelReference, path_from, short_names
from llmevo.models.sources import Sources, is_adapter
from llmevo.models.tokenizer import template_of


@dataclass(frozen=True)
class Preset:
    """The size of a search."""

    budget: int
    limit: int
    """Questions of each task that a candidate answers."""
    finalists: int


PRESETS: Mapping[str, Preset] = {
    "quick": Preset(20, 50, 2),
    "standard": Preset(60, 150, 4),
    "thorough": Preset(150, 400, 8),
}

SHARES = "{search: 0.5, selection: 0.2, heldout: 0.3}"

LEAST = 40
"""Questions of a file that are too few for a search and a held-out score: their standard errors exceed any gain."""

SCHEMA = "llmevo.schema.json"
"""The file that editors read the config's keys from; it is written beside the config."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

QUESTIONS = ("question", "prompt", "instruction", "input", "query")
ANSWERS = ("answer", "target", "output", "response", "completion", "label")
"""The names of the columns that hold a question and its answer, those that are looked for first in front."""

TIME = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d(:\d\d(:\d\d)?)?Z?)?")
DATE = "%Y-%m-%d"


@dataclass(frozen=True)
class DraftTask:
    """A task of the config: an lm-eval task, or a file of questions."""

    name: str
    metric: str = ""
    others: Sequence[str] = ()
    """Further metrics that it has."""
    heldout: "DraftTask | None" = None
    """The task with the questions that are held out; None where the questions are split."""
    file: Path | None = None
    """The task file that is to be written beside the questions."""
    description: str = ""
    """Its content."""
    repeated: str = ""
    """How many of the questions are repeated, in words; empty where none is."""

    def line(self, count: int) -> str:
        """Its line in a list of so many tasks, each with an equal weight; the weights' sum is 1."""
        weight = f", weight: {1 / count:.4g}" if count > 1 else ""
        metric = f', metric: "{self.metric}"' if self.metric else ""
        more = f"  # or {', '.join(self.others)}" if self.others else ""
        return f"  - {{name: {_scalar(self.name)}{weight}{metric}}}{more}"


@dataclass(frozen=True)
class Draft:
    """A config as a user begins with it."""

    models: Sequence[str]
    base: str | None
    tasks: Sequence[DraftTask]
    preset: str = "standard"
    llm: str = ""
    """The model that proposes candidates; empty: what `--api-key` and `--model` say when the run starts."""
    server: str = ""
    """The URL of its server."""
    layers: int | None = None
    """The number of the base's layers, where that is on this machine."""
    folders: Sequence[str] = field(default_factory=tuple[str, ...])
    """The folders of task files, relative to the config."""
    chat: bool = True
    """Whether questions are asked as chat messages."""

    def text(self) -> str:
        """Return the YAML text, with a comment where a user is likely to change a value."""
        preset = PRESETS[self.preset]
        half = self.layers // 2 if self.layers and self.layers % 2 == 0 else 0
        lines = [
            f"# yaml-language-server: $schema={SCHEMA}",
            "# `llmevo inspect` checks this config and says how long a run takes; `llmevo run` starts it.",
            "genome:",
        ]
        if self.base:
            lines.append(f"  base_model: {_scalar(self.base)}  # the model that the others were tuned from")
        lines += ["  models:", *(f"    - {_scalar(model)}" for model in self.models)]
        method = "task_arithmetic" if self.base else "linear"
        lines.append(f"  merge_method: {method}  # or several, among which the search chooses: [{method}, ties]")
        lines += self._preparation()
        if half:
            lines.append(f"  # layer_granularity: {half}  # two slices of the layers, each with weights of its own")
        held_out = [task.heldout for task in self.tasks if task.heldout]
        count = len(self.tasks)
        best = "the best mean, the sum of weight times score" if count > 1 else "the best score"
        lines += ["", f"# Asked of every candidate. The result is the merge with {best}.", "tasks:"]
        lines += [task.line(count) for task in self.tasks]
        lines.append(f"limit: {preset.limit}  # search questions of each task, at most")
        if len(held_out) < count:
            lines.append(f"split: {SHARES}  # of each task's questions; the last are asked once, at the end")
        else:
            lines += ["# Asked once, at the end.", "heldout:", *(task.line(count) for task in held_out)]
        lines.append(
            "apply_chat_template: true  # asked as chat messages; false: as texts that the model continues"
            if self.chat
            else "apply_chat_template: false  # the model has no chat template: it continues the questions as texts"
        )
        if self.folders:
            lines.append(f"task_search_path: [{', '.join(map(_scalar, self.folders))}]")
        size = f"budget: {preset.budget}, finalists: {preset.finalists}"
        lines += ["", f"search: {{optimizer: llm, {size}}}  # the budget is how many candidates are scored"]
        if self.llm:
            server = f", base_url: {_scalar(self.server)}" if self.server else ""
            lines.append(f"llm: {{model: {_scalar(self.llm)}{server}}}  # --api-key KEY, where the server wants one")
        else:
            lines.append("llm: {proposer: auto}  # an LLM takes part with --api-key, or --base-url and --model")
        return "\n".join([*lines, ""])

    def _preparation(self) -> list[str]:
        """Return the comment with the preparation for experts of known tasks: empty for fewer than two of a base.
        Tasks go to the models in turn, and a model that is left without one has `TASK`.
        """
        experts = [ModelReference.parse(model) for model in self.models if model != self.base]
        if self.base is None or len(experts) < 2:
            return []
        names = [task.name for task in self.tasks]
        own = {
            name: names[place :: len(experts)] or ["TASK"] for place, name in enumerate(short_names(experts).values())
        }
        tasks = ", ".join(f"{_scalar(name)}: [{', '.join(map(_scalar, of))}]" for name, of in own.items())
        return [
            "  # If you know which task each model was trained for, name it here: see docs/preparation.md.",
            f"  # prepare: {{steps: [regmean], tasks: {{{tasks}}}}}",
        ]


def _scalar(text: str) -> str:
    """A text as YAML writes it in a line."""
    return yaml.safe_dump([text], default_flow_style=True, width=10_000).strip()[1:-1]


def base_of(models: Sequence[str]) -> str | None:
    """Return the base that the models name in `adapter_config.json` or in their cards; None where they do not agree.

    Looks at folders only, and downloads nothing.
    """
    named = {base for model in models if (base := _base_of(Path(model)))}
    return named.pop() if len(named) == 1 else None


def _base_of(folder: Path) -> str | None:
    if (folder / "adapter_config.json").is_file():
        base = read_object(folder / "adapter_config.json", f"{folder} must be an adapter that PEFT has saved").get(
            "base_model_name_or_path"
        )
        return base if isinstance(base, str) and base else None
    card = folder / "README.md"
    try:
        data = metadata_load(card) if card.is_file() else None
    except (ValueError, yaml.YAMLError):
        return None
    base: Any = (data or {}).get("base_model")
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    return base if isinstance(base, str) else None


def on_base(models: Sequence[str], base: str | None) -> list[str]:
    """Return the models, with the base before each that is an adapter alone."""
    return [f"{base}+{of}" if base and is_adapter(Path(of)) else of for of in models]


def check_models(models: Sequence[str], base: str | None) -> int | None:
    """Return the number of layers, where a model is on this machine.

    Raises UserError for a text that is no reference or names no folder, SourceError for a folder that is no model.
    """
    references = [*map(_reference, models), *([_reference(base)] if base else [])]
    sources = Sources()
    depths = {str(of): sources.depth(of) for of in references if _is_here(of)}
    if len({*depths.values()}) > 1:
        said = ", ".join(f"{name} {depth}" for name, depth in depths.items())
        raise SourceError(f"the models have different numbers of layers ({said}); name fine-tunes of one model")
    return next(iter(depths.values()), None)


def has_chat_template(model: str) -> bool:
    """Return whether a model has a chat template; True where it is not a folder on this machine."""
    folder = Path(model)
    return not (folder / "tokenizer_config.json").is_file() or template_of(folder) is not None


def schema_text() -> str:
    """Return the JSON schema of configs; the wheel has it in the package, the repository among its documents."""
    package = Path(__file__).parents[1]
    folders = (package / "schemas", package.parent / "docs" / "schemas")
    return next(file for folder in folders if (file := folder / "config.json").is_file()).read_text()


def _is_here(reference: ModelReference) -> bool:
    """Return whether all parts are on this machine. Raises UserError for one that can be nowhere else and is not."""
    found: list[bool] = []
    for part in filter(None, (reference.model, reference.lora)):
        found.append(part.path.startswith(PACKAGE) or Path(part.path).exists())
        if not found[-1] and not HUB_ID.fullmatch(part.path):
            raise UserError(f"{part.path}: there is no such folder, and it is no id of the hub, OWNER/NAME")
    return all(found)


def placed(text: str, folder: Path) -> str:
    """Return a reference as a config in `folder` names it: paths on this machine are relative to the config."""
    parts = text.split("+") if not Path(text).exists() else [text]

    def moved(part: str) -> str:
        path, mark, expert = part.partition(EXPERT)
        return f"{path_from(path, Path(), folder)}{mark}{expert}"

    return "+".join(map(moved, parts))


def _reference(text: str) -> ModelReference:
    try:
        return ModelReference.parse(text)
    except ValueError as error:
        raise UserError(f"{text!r} is no model: {shortened(str(error))}") from None


def draft_tasks(names: Sequence[str], heldout: Sequence[str]) -> list[DraftTask]:
    """Return the tasks of a config.

    A name is one of lm-eval's tasks or a file of questions, `.jsonl`. A public benchmark is searched on its training
    split; its test split is held out. With `heldout`, names of lm-eval's tasks are taken as they are. Raises TaskError.
    """
    if heldout and len(heldout) != len(names):
        raise TaskError(f"--heldout: give one for each --task, {len(names)} and not {len(heldout)}")
    every = [*names, *heldout]
    files = {name: own_task(Path(name)) for name in every if name.endswith((".jsonl", ".json"))}
    listed = _listed([name for name in every if name not in files])
    if heldout:
        taken = [files.get(name) or DraftTask(name) for name in every]
        made = [replace(task, heldout=held) for task, held in zip(taken, taken[len(names) :], strict=False)]
    else:
        taken = made = [files[name] if name in files else _trainable(listed[name]) for name in names]
    given: dict[str, str] = {}
    for task, name in zip(taken, every, strict=True):
        if task.name in given:
            other = given[task.name]
            same = f"{other} makes a task {task.name} too; rename one of the files"
            raise TaskError(f"--task {name}: {'it is given twice; leave one out' if other == name else same}")
        given[task.name] = name
    return made


def _listed(names: Sequence[str]) -> Mapping[str, Any]:
    if not names:
        return {}
    from llmevo.evaluation.tasks.listing import list_tasks  # lm-eval takes seconds to import

    known = {task.name: task for task in list_tasks([], built_in=True)}
    for name in names:
        if name in known or name.removesuffix("_train") in known:
            continue
        if Path(name).is_file():
            raise TaskError(
                f"--task {name}: only questions in JSON Lines are read, a file NAME.jsonl with one object a line;"
                " convert the file, or describe it in a task file of lm-eval (docs/guides/tasks.md)"
            )
        raise TaskError(
            f"--task {name}: there is no such task{near(name, known)}; `llmevo tasks --built-in` lists lm-eval's; your"
            " own questions are a file, NAME.jsonl"
        )
    return {name: known.get(name) or known[name.removesuffix("_train")] for name in names}


def _trainable(task: Any) -> DraftTask:
    if task.train is None:
        raise TaskError(
            f"--task {task.name}: it has a test split only, and a search on that would leave nothing to measure the"
            f" result with; `llmevo tasks --built-in --trainable` lists tasks with a training split, and"
            f" `--task OTHER --heldout {task.name}` keeps this one for the end"
        )
    metric, *others = task.metrics or [""]
    scored = DraftTask(task.name, metric if others else "", others)
    return replace(scored, name=task.train, heldout=scored)


def own_task(file: Path) -> DraftTask:
    """Return the task of a file with one question a line, in JSON.

    Read are `question`, `choices` and `answer` (its place or its text), or a question and the text of its answer.
    Raises TaskError that says what is missing.
    """
    rows = _rows(file)
    name, first = file.stem.replace(" ", "_").replace(".", "_"), rows[0]
    question = next((key for key in QUESTIONS if key in first), None)
    answer = next((key for key in ANSWERS if key in first), None)
    if question is None or answer is None:
        raise TaskError(
            f"{file}: its columns are {', '.join(map(str, first))}; a question is one of {', '.join(QUESTIONS)}, its"
            f" answer one of {', '.join(ANSWERS)}, with `choices` for a list to choose from"
        )
    for number, row in enumerate(rows, 1):
        place = f"{file}, line {number}"
        _check_row(row, question, answer, "choices" in first, place)
        if type(row[answer]) is not type(first[answer]):  # `datasets` would write 1 as 1.0 beside 0.5
            one, other = (shortened(repr(of[answer]), 80) for of in (row, first))
            raise TaskError(f"{place}: {answer} is {one}, and in the first line {other}; write all as texts or none")
    same = repeated(str(row[question]) for row in rows)
    said = f"{same} of the {len(rows)} questions of {file} are repeated" if same else ""
    if len(rows) - same < LEAST:
        raise TaskError(f"{said}; a search and a held-out score need at least {LEAST} different ones, better 200")
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": file.name}},
        "test_split": "test",
    }
    if "choices" in first:
        _check_times("choices", [choice for row in rows for choice in row["choices"]], file)
        target = answer if isinstance(first[answer], int) else f"{{{{choices.index({answer})}}}}"
        task |= {
            "output_type": "multiple_choice",
            "doc_to_text": f"{{{{{question}}}}}\nAnswer:",
            "doc_to_choice": "choices",
            "doc_to_target": target,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    else:
        given = [row[answer] for row in rows]
        answers = [str(of).strip() for of in given]
        if texts := isinstance(given[0], str):
            _check_times(answer, given, file)
        task |= {
            "output_type": "generate_until",
            "doc_to_text": f"{{{{{question}}}}}\nAnswer:",
            "doc_to_target": _target(answer, given) if texts else f"{{{{{answer}}}}}",
            "generation_kwargs": {
                "until": [_stop(answers)],
                "max_gen_toks": max(16, min(512, max(map(len, answers)))),
                "do_sample": False,
            },
            "filter_list": [
                {"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
            ],
            "metric_list": [
                {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
            ],
        }
    text = f"# The questions of {file.name} as a task of lm-eval; change what is asked here.\n"
    metric = "acc,none" if "choices" in first else "exact_match,none"
    return DraftTask(
        name,
        metric,
        file=file.with_suffix(".yaml"),
        description=text + yaml.safe_dump(task, sort_keys=False),
        repeated=said,
    )


def _target(column: str, texts: Sequence[str]) -> str:
    """Return lm-eval's `doc_to_target` of texts in a column; replies are compared without spaces at their ends."""
    if _are_times(texts):
        return f"{{{{{column}.strftime('{DATE}')}}}}"
    if all(text == text.strip() for text in texts):
        return column  # lm-eval reads the text of a template as Python where it looks like a list
    return f"{{{{{column}|trim}}}}"


def _are_times(texts: Sequence[str]) -> bool:
    """Return whether `datasets` reads a column of texts as times, which is so where all of them look like one."""
    return all(map(TIME.fullmatch, texts))


def _check_times(column: str, texts: Sequence[str], file: Path) -> None:
    """Raise TaskError for a column that `datasets` reads as times and that no template writes again."""
    if _are_times(texts) and (column == "choices" or any(len(text) != len("2000-01-01") for text in texts)):
        raise TaskError(
            f"{file}: {column} are times, such as {texts[0]!r}, which `datasets` writes in another way; write the"
            " months' names, as in 2 January 2000"
        )


def _stop(answers: Sequence[str]) -> str:
    """Return a text that ends a reply: line ends that no answer holds."""
    stops = ("\n" * count for count in range(1, max(map(len, answers)) + 2))
    return next(stop for stop in stops if not any(stop in of for of in answers))


def _check_row(row: Mapping[str, Any], question: str, answer: str, chosen: bool, place: str) -> None:
    wanted = (question, answer, "choices") if chosen else (question, answer)
    if missing := [key for key in wanted if row.get(key) in (None, "", [])]:
        raise TaskError(f"{place}: {missing[0]!r} is missing or empty")
    if chosen:
        choices, given = row["choices"], row[answer]
        if not isinstance(choices, list):
            raise TaskError(f"{place}: choices is no list but {shortened(repr(choices), 80)}")
        if not all(isinstance(choice, str) for choice in choices):
            raise TaskError(f"{place}: choices are not all texts: {shortened(repr(choices), 80)}; write them in quotes")
        right = given in range(len(choices)) if isinstance(given, int) else given in choices
        if not right:
            raise TaskError(
                f"{place}: {answer} is {shortened(repr(given), 80)}; give the place of the right choice, from 0 to"
                f" {len(choices) - 1}, or its text"
            )


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # JSON may hold other ends of lines as they are
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{file}: cannot be read ({error})") from error
    if lines[0].startswith("\ufeff"):
        raise TaskError(f"{file}: it begins with a byte order mark, which `datasets` cannot read; save it without one")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TaskError(f"{file}, line {number}: it is no JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise TaskError(f'{file}, line {number}: it is no object, such as {{"question": …, "answer": …}}')
        rows.append(row)
    if len(rows) < LEAST:
        raise TaskError(
            f"{file}: it has {len(rows)} questions; a search and a held-out score need at least {LEAST}, better 200"
        )
    return rows


def folders(tasks: Sequence[DraftTask], place: Path) -> list[str]:
    """The folders of the task files, relative to the config's."""
    return [*dict.fromkeys(os.path.relpath(task.file.parent, place) for task in tasks if task.file)]
