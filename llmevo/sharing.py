"""A run made fit for others: nothing of this machine in it, and its recipe still the same model."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmevo import events
from llmevo.errors import UserError
from llmevo.merging import Seed, seed_of
from llmevo.planning import plan
from llmevo.recipe import Recipe
from llmevo.references import PACKAGE, ModelPath, ModelReference
from llmevo.runlog import LOG, parse_event
from llmevo.sources import Sources
from llmevo.state import RunState
from llmevo.writing import whole_folder

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
"""Methods with random masks: theirs follow from the models' references as well, which may change in others' hands."""
MASKS = "masks.json"
WITHHELD = ("texts", "replies")
"""What a shared log lacks: questions and answers are not ours to publish, nor to be trained on."""
PRIVATE = "api_key_file"
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
        parts = Path(of.path).parts
        return of.model_copy(update={"path": "./" + "/".join(part for part in parts[-2:] if part not in ("/", "~"))})

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
        self._prefixes = self._replacements(root)
        self.lines = [self._line(event) for event in recorded]
        self.state = RunState.fold(events.EVENTS.validate_python(line) for line in self.lines)

    def _replacements(self, root: Path) -> list[tuple[re.Pattern[str], str]]:
        """Places of this machine, the longest first, and what stands for them."""
        found = {old: new for old, new in self.names.items() if old != new and "+" not in old}
        for old, new in self.names.items():
            found |= {a: b for a, b in zip(old.split("+"), new.split("+"), strict=True) if a != b}
        found |= {str(place): name for place, name in ((Path.home(), "~"), (root, ".")) if len(place.parts) > 1}
        after = r"(?=$|[/\s'\"`:;,)\]+@])"
        return [
            (re.compile(r"(?<![\w./~-])" + re.escape(old) + after), new)
            for old, new in sorted(found.items(), key=lambda pair: -len(pair[0]))
        ]

    def _line(self, event: events.Event) -> dict[str, Any]:
        """One event without what belongs to this machine."""
        raw = {key: value for key, value in event.model_dump(mode="json", by_alias=True).items() if key not in WITHHELD}
        if isinstance(event, events.RunStarted):
            llm = {key: value for key, value in (raw["config"].get("llm") or {}).items() if key != PRIVATE}
            raw |= {"root": ".", "config": {**raw["config"], **({"llm": llm} if llm else {})}}
        return self.clean(raw)

    def clean(self, value: Any) -> Any:
        """The value with every place of this machine replaced, and without passwords in addresses."""
        if isinstance(value, list):
            return [self.clean(part) for part in value]
        if isinstance(value, dict):
            return {self.clean(key): self.clean(part) for key, part in value.items()}
        if not isinstance(value, str):
            return value
        for pattern, name in self._prefixes:
            value = pattern.sub(name.replace("\\", r"\\"), value)
        return re.sub(r"://[^/@\s]+@", "://", value)

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


def masks_of(recipe: Recipe, sources: Sources, seed: Seed) -> str | None:
    """The seed of every random mask, tensor by tensor, models in the order of the recipe; None where it has none."""
    methods = {recipe.merge_method, *(of.merge_method for of in recipe.slices or [])}
    if not methods & {*RANDOM}:
        return None
    steps = plan(recipe, [*sources[recipe.donor].shapes], sources.depth(recipe.donor))
    models = recipe.references
    return json.dumps({step.name: [seed_of(seed, step.name, model) for model in models] for step in steps}) + "\n"


def read_masks(file: Path, recipe: Recipe) -> Seed:
    """The seeds in such a file, for a recipe whose models may be called otherwise now. Raises UserError."""
    try:
        table: Mapping[str, Sequence[int]] = json.loads(file.read_text())
        places = {model: place for place, model in enumerate(recipe.references)}
        if any(len(seeds) != len(places) for seeds in table.values()):
            raise UserError(
                f"{file}: is of a recipe with another number of models; leave out the line `# llmevo:` above"
            )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); it belongs to the recipe, fetch it again") from error

    def seed(tensor: str, model: ModelReference) -> int:
        if tensor not in table:
            raise UserError(f"{file}: has no seed for {tensor}; these are other models than the recipe was found for")
        return table[tensor][places[model]]

    return seed


def write_pack(shared: SharedRun, texts: Mapping[str, str], out: Path) -> None:
    """A folder with the recipe and how it was found. Raises UserError when `out` holds something."""
    files = {LOG: shared.log(), "config.yml": shared.config(), "LICENSES.md": shared.licences(), **texts}
    with whole_folder(out) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)
