"""A run as it is published: without places and secrets of this machine, and with a recipe of the same model."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llmevo.errors import UserError, without_passwords
from llmevo.merging.writer import whole_folder
from llmevo.models.references import PACKAGE, ModelPath, ModelReference
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, parse_event

EVENT_FIELDS: Mapping[str, str] = {
    "run_started": "root prompts versions sources[reference revision checksum config licence] seed evaluation_seed"
    " genes[name low high choices] layers routers items heldout_items selection_items rules order workers proposer"
    " style questions clusters groups vocabulary start_from[name genes] geometry cards descriptions chances"
    " scan layer_parameters other_parameters active_parameters head_parameters",
    "resumed": "reason budget counts clusters groups versions",
    "prompted": "generation model style messages[role content] reply tokens cost seconds problems analysis used calls"
    " repair",
    "judged": "generation task questions model verdicts[key value] calls tokens cost",
    "presented": "task questions poll player",
    "voted": "task questions poll player other prompt choice",
    "worker": "worker change request",
    "asked": "generation candidates[id origin genes recipe note expected]",
    "evaluated": "candidate score stderr tasks items item_scores item_probabilities seconds cached rival proxy"
    " workers losses quantized",
    "selected": "candidate generation finalists score stderr tasks items item_scores item_probabilities seconds cached"
    " workers losses quantized",
    "served": "candidate questions generation finalists score stderr tasks items item_scores item_probabilities seconds"
    " cached workers losses quantized",
    "failed": "candidate reason seconds workers losses",
    "told": "generation state sigma best trust candidates violations",
    "heldout": "row kind candidate score stderr tasks items item_scores item_probabilities seconds cached workers"
    " losses quantized",
    "unscored": "step candidate reason row kind questions generation finalists seconds workers losses quantized",
    "run_finished": "best search_score heldout violated front proposals",
}
"""The published fields of each event, besides its kind, time and schema; brackets hold the fields of a list's entries.

Withheld are the questions, the models' replies and quotations of them: they are not ours to publish, nor should models
be trained on them; and the names of machines, with the messages of their processes. `config` and `forced` follow
`CONFIG_KEYS`; `reason` of a failure is cut where it quotes a reply.
"""

_TASK = (
    "name weight metric questions text! function! prompts! judge[model scale repairs parallel max_tokens timeout"
    " retries reply_tokens price[prompt completion] rubric!] votes[reply_tokens pairs]"
)

CONFIG_KEYS = (
    "genome[models merge_method method_per_slice base_model tokenizer_source layer_granularity normalize"
    " allow_negative_weights filters smooth bounds parameters prepare[steps text! tasks] dtype split"
    " path[deepest first last edits kinds longest gains scan!]"
    " architecture mixture[experts experts_per_token layers temperature bias]]"
    f" tasks[{_TASK}] heldout[{_TASK}] constraints allow_benchmark_tasks gate[tokens share prompts!] task_search_path!"
    " split[search selection heldout] limit num_fewshot shuffle random_init apply_chat_template fewshot_as_multiturn"
    " search[optimizer budget population seed evaluation_seed racing[error_rate looks proxy] finalists objective"
    " sizes spaces shares sigma_rule order prior start_from!]"
    " llm[proposer model temperature max_tokens timeout retries form mask_names max_calls"
    " max_cost strict price[prompt completion] prompts! transcript!]"
    " engine[backend adapters device self_check cache_gb quantize quantize_at workers[min max] on gpus_per_worker]"
)
"""The published keys of a config; a key with `!` is a file or folder, published without its place on this machine.

Withheld are the addresses of servers, the files of keys, the options of vLLM and the loggers: they belong to one
machine or account.
"""

_PART = r"(?:\\\s|(?<=\w)'(?=\w)|[^\s/'\"`])+"
PLACES = re.compile(
    rf"(?:(?i:\bfile):/+(?:{_PART}/)*"  # a file's URL
    rf"|(?<![\w./~}}])(?!/\w*>)(?:~[\w.-]*)?/(?:{_PART}/)+"  # an absolute path of two parts or more, no closing tag
    rf"|(?<![\w.])(?:\.\./)+(?:{_PART}/)*)"  # a path that leaves its folder
    rf"(?={_PART})"
)
"""The folders of a file, anywhere in a text; the file's own name follows."""

QUOTATION = re.compile(r"(?:^|[\s(\[{:=,])(['\"])")

HOME = re.compile(r"^(?:~[^/]*|/(?:home|Users)/[^/]+|/root)/")
"""A user's own folder, whose name may be that of a person."""

CUT = "…"

LICENCES = """\
# Licences

This folder holds a recipe and the log of its search, and no weights. A model merged by the recipe is a derivative of
all the models below, and their licences apply to it.

| model | revision | licence |
|---|---|---|
"""


def portable(reference: ModelReference) -> ModelReference:
    """The reference without the places of this machine: `/data/models/arith` becomes `./models/arith`."""

    def path(of: ModelPath) -> ModelPath:
        parts = of.path.split("/")
        if not of.path.startswith(("/", "~")) and ".." not in parts:
            return of
        kept = [part for part in HOME.sub("", of.path).split("/") if part not in ("", ".", "..")]
        return of.model_copy(update={"path": "./" + "/".join(kept[-2:])})

    return ModelReference(model=path(reference.model), lora=path(reference.lora) if reference.lora else None)


def local_paths(reference: ModelReference, root: Path) -> list[str]:
    """The files and folders of a model and its adapter that exist on this machine only."""

    def is_local(path: ModelPath) -> bool:
        if path.path.startswith(PACKAGE):
            return False
        if path.path.startswith((".", "/", "~")) or (root / path.path).exists():
            return True
        return path.path.count("/") != (2 if path.path.endswith(".gguf") else 1)

    return [str(path) for path in (reference.model, reference.lora) if path and is_local(path)]


Keys = Mapping[str, "Keys"]
"""Published keys of a mapping, or of every entry of a list; an empty mapping means the whole value."""


@cache
def _parse_keys(text: str) -> Keys:
    """The keys of a text such as `one two[inner other]`."""
    found: dict[str, Any] = {}
    levels = [found]
    for name, bracket in re.findall(r"(\w*!?)([\[\]]?)", text):
        if name:
            levels[-1][name] = {}
        if bracket == "[":
            levels.append(levels[-1][name])
        elif bracket == "]":
            levels.pop()
    return found


def _select(value: Any, keys: Keys, files: list[str]) -> Any:
    """The published part of a value; adds its files, as they were given, to `files`.

    A text instead of a mapping is its short form, such as the name of a task.
    """
    if isinstance(value, list):
        return [_select(part, keys, files) for part in value]
    if not keys or not isinstance(value, dict):
        return value
    kept: dict[str, Any] = {}
    for key, part in value.items():
        if f"{key}!" in keys:
            kept[key] = _file_names(part, files)
        elif key in keys and not key.endswith("!"):
            kept[key] = _select(part, keys[key], files)
    return kept


def _file_names(value: Any, files: list[str]) -> Any:
    if isinstance(value, list):
        return [_file_names(part, files) for part in value]
    if not isinstance(value, str):
        return value
    files.append(value)
    return file_name(value)


def public_config(config: Mapping[str, Any], files: list[str] | None = None) -> dict[str, Any]:
    """The published part of a config, or of a part of one; adds its files, as they were given, to `files`."""
    return _select(config, _parse_keys(CONFIG_KEYS), [] if files is None else files)


def file_name(path: str) -> str:
    """A file or folder as it is published: the last part, or the whole of a relative path without `..`."""
    parts = Path(path).parts
    return path if parts and parts[0] not in ("/", "~") and ".." not in parts else Path(path).name


def unquoted(reason: str) -> str:
    """The reason of a failure up to its first quotation, which may be a model's reply."""
    quotation = QUOTATION.search(reason)
    return reason[: quotation.start(1)] + CUT if quotation else reason


def without_quotes(prompt: str) -> str:
    """A prompt without the questions and replies that it quotes, each in a line that begins with `> `."""
    return re.sub(r"^> .*$", f"> {CUT}", prompt, flags=re.MULTILINE)


def root_of(folder: Path) -> Path:
    """The folder that references in a folder's recipes are relative to: that of its run, if it has a log."""
    if not (folder / LOG).exists():
        return folder
    with (folder / LOG).open("rb") as log:
        first = log.readline()
    event = parse_event(first, f"{folder / LOG}:1") if first.endswith(b"\n") else None
    return folder / event.root if isinstance(event, events.RunStarted) else folder


class SharedRun:
    """The published events of a run, and the state they fold to."""

    def __init__(self, recorded: Sequence[events.Event], root: Path) -> None:
        """`root` is the folder of the run's relative references. Raises UserError when two models get the same name."""
        self.root = root
        started = next((event for event in recorded if isinstance(event, events.RunStarted)), None)
        given = [ModelReference.parse(source["reference"]) for source in started.sources] if started else []
        self.names = {str(reference): str(portable(reference)) for reference in given}
        if len({*self.names.values()}) < len(self.names):
            raise UserError(f"export: two models get the same name without their paths: {', '.join(self.names)}")
        local = [path for reference in given for path in local_paths(reference, root)]
        self.local = [*dict.fromkeys(str(portable(ModelReference.parse(path))) for path in local)]
        """The published names of the models that exist on this machine only."""
        files: list[str] = []
        if started:
            public_config(started.config, files)
        reasons = {event.reason for event in recorded if isinstance(event, events.Failed | events.Unscored)}
        self._replacements = [*_quotations(reasons), *self._places(files)]
        self.lines = [self._line(event) for event in recorded]
        self.state = RunState.fold(events.EVENTS.validate_python(line) for line in self.lines)

    def _places(self, files: Iterable[str]) -> Iterator[tuple[re.Pattern[str], str]]:
        """The places of this machine with their published names, the longest first."""
        found: dict[str, str] = {}
        for old, new in self.names.items():
            found |= {a: b for a, b in zip(old.split("+"), new.split("+"), strict=True) if a != b}
        found |= {str(place): name for place, name in ((Path.home(), "~"), (self.root, ".")) if len(place.parts) > 1}
        found |= {file: file_name(file) for file in files if Path(file).is_absolute()}
        for old, new in sorted(found.items(), key=lambda pair: -len(pair[0])):
            yield re.compile(r"(?<![\w./~-])" + re.escape(old) + r"(?=$|[/\s'\"`:;,)\]+@])"), new

    def _line(self, event: events.Event) -> dict[str, Any]:
        """The published part of one event."""
        raw = event.model_dump(mode="json", by_alias=True)
        kept = {key: raw[key] for key in ("event", "time", "schema")} | _select(
            raw, _parse_keys(EVENT_FIELDS[event.event]), []
        )
        match event:
            case events.RunStarted():
                kept |= {"root": ".", "config": public_config(event.config)}
            case events.Resumed():
                kept["forced"] = [*filter(None, map(self._change, event.forced))]
            case events.Presented():
                kept["replies"] = []
            case events.Prompted():
                kept["messages"] = [{**each, "content": without_quotes(each["content"])} for each in kept["messages"]]
            case events.Failed() | events.Unscored():
                kept["reason"] = unquoted(event.reason)
            case _:
                pass
        return self.clean(kept)

    def _change(self, change: events.Change) -> dict[str, Any] | None:
        """A change that --force allowed; None if its key is withheld."""
        kind, _, name = change.key.partition(".")
        if kind == "sources":
            reference, _, what = name.rpartition(".")
            return {**change.model_dump(), "key": f"{kind}.{self.names.get(reference, reference)}.{what}"}
        if kind != "config":
            return change.model_dump()
        section, _, inner = name.partition(".")
        before, now = (
            public_config({section: {inner: value} if inner else value}) for value in (change.before, change.now)
        )
        if inner:
            before, now = before.get(section) or {}, now.get(section) or {}
        last = inner or section
        if last not in before and last not in now:
            return None
        return {"key": change.key, "before": before.get(last), "now": now.get(last)}

    def clean(self, value: Any) -> Any:
        """The value without places of this machine, passwords in addresses, and replies that failures quote."""
        if isinstance(value, list):
            return [self.clean(part) for part in value]
        if isinstance(value, dict):
            return {self.clean(key): self.clean(part) for key, part in value.items()}
        if not isinstance(value, str):
            return value
        for pattern, name in self._replacements:
            value = pattern.sub(name.replace("\\", r"\\"), value)
        return PLACES.sub("", without_passwords(value))

    def log(self) -> str:
        """The text of the log."""
        return "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in self.lines)

    def config(self) -> str:
        """The text of the config, with the overrides of the command line."""
        assert self.state.started is not None
        return yaml.safe_dump(self.state.started.config, sort_keys=False, width=100, allow_unicode=True)


def _quotations(reasons: Iterable[str]) -> Iterator[tuple[re.Pattern[str], str]]:
    """Reasons that quote a reply, as a prompt repeats them (in one line, and maybe cut), without the quotation."""
    for reason in reasons:
        short = unquoted(reason)
        if short != reason and len(short) > 8:  # shorter ones could match other texts
            start = r"\s+".join(map(re.escape, short.removesuffix(CUT).split()))
            yield re.compile(start + r"\s*(?=['\"]).*"), short


def write_pack(shared: SharedRun, texts: Mapping[str, str], out: Path) -> None:
    """Write the log, config, licences and `texts` of a run. Raises UserError when `out` exists and is not empty."""
    assert shared.state.started is not None
    licences = LICENCES + "".join(
        f"| `{source['reference']}` | {source['revision'] or ''} | {source['licence'] or 'unknown'} |\n"
        for source in shared.state.started.sources
    )
    files = {LOG: shared.log(), "config.yml": shared.config(), "LICENSES.md": licences, **texts}
    with whole_folder(out) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)
