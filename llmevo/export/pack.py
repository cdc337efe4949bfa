"""A run made fit for others: nothing of this machine in it, and its recipe still the same model."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llmevo.errors import UserError
from llmevo.merging.writer import whole_folder
from llmevo.models.references import PACKAGE, ModelPath, ModelReference
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, parse_event

EVENT_FIELDS: Mapping[str, str] = {
    "run_started": "root prompts versions sources[reference revision checksum licence] seed evaluation_seed"
    " genes[name low high choices] layers items heldout_items selection_items rules proposer style questions"
    " start_from[name genes] geometry",
    "resumed": "reason budget versions",
    "prompted": "generation model style messages[role content] reply tokens cost seconds problems analysis used calls"
    " repair",
    "judged": "generation task questions model verdicts[key value] calls tokens cost",
    "presented": "task questions poll player",
    "voted": "task questions poll player other prompt choice",
    "asked": "generation candidates[id origin genes recipe note expected]",
    "evaluated": "candidate score stderr tasks items item_scores item_probabilities seconds cached rival proxy",
    "selected": "candidate generation finalists score stderr tasks items item_scores item_probabilities seconds cached",
    "failed": "candidate reason seconds",
    "told": "generation state sigma best trust violations",
    "heldout": "row kind candidate score stderr tasks items item_scores item_probabilities seconds cached",
    "run_finished": "best search_score heldout violated front proposals",
}
"""What is published of each event, beside its kind, time and schema: nothing that is not listed. The fields in brackets
are those of the entries of a list.

Left out are the questions, the models' replies and what quotes them: they are not ours to publish, nor to be trained
on. `config` and `forced` follow `CONFIG_KEYS`, and `reason` of a failed candidate is cut where it quotes a reply.
"""


_ASKED = (
    "name weight metric questions judge[model scale repairs parallel max_tokens timeout retries reply_tokens"
    " price[prompt completion]] votes[reply_tokens pairs]"
)


CONFIG_KEYS = (
    "genome[models merge_method method_per_slice base_model tokenizer_source layer_granularity normalize"
    " allow_negative_weights filters smooth bounds parameters dtype]"
    f" tasks[{_ASKED}] heldout[{_ASKED}] constraints allow_benchmark_tasks gate[tokens share]"
    " split[search selection heldout] limit num_fewshot shuffle random_init apply_chat_template fewshot_as_multiturn"
    " search[optimizer budget population seed evaluation_seed racing[error_rate looks proxy] finalists objective"
    " sigma_rule] llm[proposer model temperature max_tokens timeout retries mask_names max_calls max_cost strict"
    " price[prompt completion]] engine[backend adapters device self_check cache_gb]"
)
"""The same of a config. Left out are the addresses of servers, the files of keys, the options of vLLM and the loggers:
they are of one machine or one account."""


_FILES = "text function prompts judge[rubric]"


CONFIG_FILES = (
    f"tasks[{_FILES}] heldout[{_FILES}] gate[prompts] search[start_from] llm[prompts transcript] task_search_path"
)
"""The keys of a config that are files or folders: published without the folder that they lie in on this machine."""


ABSOLUTE = re.compile(r"(?<![^\s'\"`(\[{<=:,;|])(?:~[\w.-]*)?(?:/[\w.@+-]+)+/(?P<name>[\w.@+-]+)")
"""An absolute path of two parts or more, wherever it stands in a text."""


QUOTATION = re.compile(r"(?:^|[\s(\[{:=,])(['\"])")


HOME = re.compile(r"^(?:~[^/]*|/(?:home|Users)/[^/]+|/root)/")
"""A user's own folder, whose name may be that of a person."""


CUT = "…"


LEAST = 8
"""Characters of a reason before its quotation, by which it is found in a prompt."""


LICENCES = """\
# Licences

This folder holds a recipe and how it was found, and no weights. A model that is merged by it is a derivative of all the
models below, and their licences hold for it.

| model | revision | licence |
|---|---|---|
"""


def portable(reference: ModelReference) -> ModelReference:
    """The reference without an absolute path: `/data/models/arith` becomes `./models/arith`."""

    def path(of: ModelPath | None) -> ModelPath | None:
        if of is None or not of.path.startswith(("/", "~")):
            return of
        parts = [part for part in HOME.sub("", of.path).split("/") if part]
        return of.model_copy(update={"path": "./" + "/".join(parts[-2:])})

    return ModelReference(model=path(reference.model) or reference.model, lora=path(reference.lora))


def local_paths(reference: ModelReference, root: Path) -> list[str]:
    """What of it nobody else can resolve: files and folders of this machine, of the model and the adapter."""

    def is_local(path: ModelPath) -> bool:
        if path.path.startswith(PACKAGE):
            return False
        if path.path.startswith((".", "/", "~")) or (root / path.path).exists():
            return True
        return path.path.count("/") != (2 if path.path.endswith(".gguf") else 1)

    return [str(path) for path in (reference.model, reference.lora) if path and is_local(path)]


Keys = Mapping[str, "Keys"]
"""Keys of a mapping, or of every entry of a list; without keys of their own where the whole value is meant."""


@cache
def parsed_keys(text: str) -> Keys:
    """The keys that are listed as `one two[inner other]`."""
    found: dict[str, Any] = {}
    open_ = [found]
    for name, bracket in re.findall(r"(\w*)([\[\]]?)", text):
        if name:
            open_[-1][name] = {}
        if bracket == "[":
            open_.append(open_[-1][name])
        elif bracket == "]":
            open_.pop()
    return found


def _listed(value: Any, keys: Keys) -> Any:
    """What of a value is listed. Texts where a mapping is expected are the short form of one: the name of a task."""
    if isinstance(value, list):
        return [_listed(part, keys) for part in value]
    if keys and isinstance(value, dict):
        return {key: _listed(part, keys[key]) for key, part in value.items() if key in keys}
    return value


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is published of a config, or of a part of one."""
    return _joined(_listed(config, parsed_keys(CONFIG_KEYS)), _files_of(config, parsed_keys(CONFIG_FILES)))


def _files_of(value: Any, keys: Keys) -> Any:
    """The files and folders in a config without their place, in the form of the config."""
    if isinstance(value, list):
        return [_files_of(part, keys) for part in value]
    if keys and isinstance(value, dict):
        return {key: _files_of(part, keys[key]) for key, part in value.items() if key in keys}
    return file_name(value) if isinstance(value, str) and not keys else value


def _joined(one: Any, other: Any) -> Any:
    """Two parts of one config as one."""
    if isinstance(one, dict) and isinstance(other, dict):
        both = {key: _joined(one[key], other[key]) for key in one.keys() & other.keys()}
        return {**one, **other, **both}
    if isinstance(one, list) and isinstance(other, list):
        return [_joined(*pair) for pair in zip(one, other, strict=True)]
    return one


def _files_in(config: Any, keys: Keys | None = None) -> Iterator[str]:
    """Every file and folder that a config names, as it is written there."""
    keys = parsed_keys(CONFIG_FILES) if keys is None else keys
    if isinstance(config, list):
        for part in config:
            yield from _files_in(part, keys)
    elif keys and isinstance(config, dict):
        for key in config.keys() & keys.keys():
            yield from _files_in(config[key], keys[key]) if keys[key] else _texts_of(config[key])


def _texts_of(value: Any) -> Iterator[str]:
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            yield text


def file_name(path: str) -> str:
    """A file or folder as it is published: a relative path as it is, of any other the last part."""
    parts = Path(path).parts
    return path if parts and parts[0] not in ("/", "~") and ".." not in parts else Path(path).name


def unquoted(reason: str) -> str:
    """The reason of a failure up to its first quotation, which may be a reply."""
    quotation = QUOTATION.search(reason)
    return reason[: quotation.start(1)] + CUT if quotation else reason


def root_of(folder: Path) -> Path:
    """Where the references of the recipes in a folder start: beside a run's log, where that run's do."""
    if not (folder / LOG).exists():
        return folder
    with (folder / LOG).open("rb") as log:
        first = log.readline()
    event = parse_event(first, f"{folder / LOG}:1") if first.endswith(b"\n") else None
    return folder / event.root if isinstance(event, events.RunStarted) else folder


class SharedRun:
    """A run's events as others may have them, and what they fold to."""

    def __init__(self, recorded: Sequence[events.Event], root: Path) -> None:
        """`root`: where the run's relative references start. Raises UserError when two models get the same name."""
        self.root = root
        started = next((event for event in recorded if isinstance(event, events.RunStarted)), None)
        given = [ModelReference.parse(source["reference"]) for source in started.sources] if started else []
        self.names = {str(reference): str(portable(reference)) for reference in given}
        if len({*self.names.values()}) < len(self.names):
            raise UserError(f"export: two models get the same name without their paths: {', '.join(self.names)}")
        local = [path for reference in given for path in local_paths(reference, root)]
        self.local = [*dict.fromkeys(str(portable(ModelReference.parse(path))) for path in local)]
        """What nobody else has, as the shared recipe calls it."""
        files = [file for config in ([started.config] if started else []) for file in _files_in(config)]
        reasons = {event.reason for event in recorded if isinstance(event, events.Failed)}
        self._prefixes = self._replacements(root, files, reasons)
        self.lines = [self._line(event) for event in recorded]
        self.state = RunState.fold(events.EVENTS.validate_python(line) for line in self.lines)

    def _replacements(
        self, root: Path, files: Iterable[str], reasons: Iterable[str]
    ) -> list[tuple[re.Pattern[str], str]]:
        """What is replaced in every text, and by what: quotations of replies, then places of this machine, the longest
        first.
        """
        found = {old: new for old, new in self.names.items() if old != new and "+" not in old}
        for old, new in self.names.items():
            found |= {a: b for a, b in zip(old.split("+"), new.split("+"), strict=True) if a != b}
        found |= {str(place): name for place, name in ((Path.home(), "~"), (root, ".")) if len(place.parts) > 1}
        found |= {file: file_name(file) for file in files if Path(file).is_absolute()}
        after = r"(?=$|[/\s'\"`:;,)\]+@])"
        quoting = {reason: unquoted(reason) for reason in reasons}
        # A prompt repeats the reason in one line and cut short.
        return [
            (re.compile(r"\s+".join(map(re.escape, short.removesuffix(CUT).split())) + r"\s*(?=['\"]).*"), short)
            for reason, short in quoting.items()
            if short != reason and len(short) > LEAST
        ] + [
            (re.compile(r"(?<![\w./~-])" + re.escape(old) + after), new)
            for old, new in sorted(found.items(), key=lambda pair: -len(pair[0]))
        ]

    def _line(self, event: events.Event) -> dict[str, Any]:
        """What is published of one event."""
        raw = event.model_dump(mode="json", by_alias=True)
        kept = {key: raw[key] for key in ("event", "time", "schema")} | _listed(
            raw, parsed_keys(EVENT_FIELDS[event.event])
        )
        match event:
            case events.RunStarted():
                kept |= {"root": ".", "config": public_config(event.config)}
            case events.Resumed():
                kept["forced"] = [*filter(None, map(self._change, event.forced))]
            case events.Presented():
                kept["replies"] = []
            case events.Failed():
                kept["reason"] = unquoted(event.reason)
            case _:
                pass
        return self.clean(kept)

    def _change(self, change: events.Change) -> dict[str, Any] | None:
        """One change that was allowed with --force; None for one of a key that is not published."""
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
        if section not in before and section not in now:
            return None
        values = [config.get(section) for config in (before, now)]
        if inner:
            if not any(inner in (value or {}) for value in values):
                return None
            values = [(value or {}).get(inner) for value in values]
        return {"key": change.key, "before": values[0], "now": values[1]}

    def clean(self, value: Any) -> Any:
        """The value without places of this machine, passwords in addresses, and replies that failures quote."""
        if isinstance(value, list):
            return [self.clean(part) for part in value]
        if isinstance(value, dict):
            return {self.clean(key): self.clean(part) for key, part in value.items()}
        if not isinstance(value, str):
            return value
        for pattern, name in self._prefixes:
            value = pattern.sub(name.replace("\\", r"\\"), value)
        value = re.sub(r"://[^/@\s]+@", "://", value)
        return ABSOLUTE.sub(r"\g<name>", value)

    def log(self) -> str:
        """The whole log."""
        return "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in self.lines)

    def config(self) -> str:
        """The config with what the command line gave."""
        assert self.state.started is not None
        return yaml.safe_dump(self.state.started.config, sort_keys=False, width=100, allow_unicode=True)

    def licences(self) -> str:
        """What holds for a model that is merged by the recipe."""
        assert self.state.started is not None
        rows = [(s["reference"], s["revision"] or "", s["licence"] or "unknown") for s in self.state.started.sources]
        return LICENCES + "".join(f"| `{name}` | {revision} | {licence} |\n" for name, revision, licence in rows)


def write_pack(shared: SharedRun, texts: Mapping[str, str], out: Path) -> None:
    """A folder with the recipe and how it was found. Raises UserError when `out` holds something."""
    files = {LOG: shared.log(), "config.yml": shared.config(), "LICENSES.md": shared.licences(), **texts}
    with whole_folder(out) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)
