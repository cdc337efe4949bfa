"""The LoRA adapter of any fine-tune: the difference to its base, truncated, and scored."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmevo.config import Config
from llmevo.errors import SourceError
from llmevo.export.cards import adapter_card
from llmevo.export.lora import REPORT, LoraReport, write_adapter
from llmevo.export.low_rank import Rank
from llmevo.export.modules import Modules
from llmevo.merging.writer import check_new
from llmevo.models.adapters import LoraModel
from llmevo.models.architecture import Shapes, check_compatible, computing, text_config
from llmevo.models.checkpoints import Weight
from llmevo.models.files import write_whole
from llmevo.models.references import ModelReference, load_pretrained, on_this_machine
from llmevo.models.sources import Sources
from llmevo.models.tokenizer import VOCABULARY


@dataclass(frozen=True)
class Scored:
    """The score of one model on the tasks of a config."""

    model: str
    """`base`, `fine-tune` or `adapter` (base and adapter)."""
    score: float
    stderr: float
    tasks: dict[str, dict[str, float]]
    """{task: {metric: value}}"""


@dataclass(frozen=True)
class Extraction:
    """An extracted adapter: its errors, and the scores where tasks were given."""

    report: LoraReport
    scores: list[Scored]


def extract(
    fine_tune: str,
    base: str,
    out: Path | str,
    *,
    rank: str | int = "auto",
    energy: float | None = None,
    parameters: int | str | None = None,
    tasks: Config | Path | str | None = None,
    root: Path | str = ".",
) -> Extraction:
    """Write the LoRA adapter of a fine-tune, as `llmevo extract` does, into `out`, a new folder in PEFT's format.

    `rank` is a number for every matrix, `exact`, or `auto`: the smallest ranks that keep `energy` (by default 0.95) of
    the squared singular values of each matrix, or with `parameters` (a number, or `10M`) the ranks with the least
    squared error of so many parameters. Biases, norms and embeddings that changed are saved whole. With `tasks`, a
    config or its file, base, fine-tune and base with adapter are asked its tasks. References start at `root`.

    Raises UserError for options and folders that cannot be used, SourceError when the models do not fit.

    >>> import llmevo
    >>> made = llmevo.extract("one", "base", "adapter", energy=0.9)
    >>> made.report.energy >= 0.9
    True
    """
    out, choice = Path(out), Rank.of(rank, energy, parameters)
    check_new(out)
    sources = Sources(Path(root))
    tuned, origin = (_reference(name) for name in (fine_tune, base))
    if (plain := sources.without_adapter(origin)) != origin:
        raise SourceError(f"BASE {base}: it has an adapter; name the plain model, {plain}")
    if sources.without_adapter(tuned) == tuned and sources.folder(tuned) == sources.folder(origin):
        raise SourceError(f"{fine_tune} and {base} are the same model; there is nothing to extract")
    source, below = sources[tuned], sources[origin]
    configs = sources.config(tuned), sources.config(origin)
    _check_vocabulary(tuned, source.shapes, origin, below.shapes)
    check_compatible(str(tuned), source.shapes, str(origin), below.shapes, configs)
    _check_computes_alike(tuned, origin, sources)

    def changes() -> Iterator[tuple[str, Weight]]:
        return ((name, source.weight(name)) for name in below.shapes)

    modules = Modules(sources.folder(origin), sources[origin].shapes)
    asked = None
    if tasks is not None:
        from llmevo.run.model_scores import ModelScorer  # lm-eval takes seconds to import

        asked = ModelScorer(tasks, Path(root))
    report = write_adapter(
        changes,
        below,
        modules,
        on_this_machine(origin, sources.root).model,
        out,
        choice,
        texts=lambda report: {"README.md": adapter_card(sources, [tuned, origin], origin, report, f"`{tuned}`")},
    )
    scores: list[Scored] = []
    if asked:
        adapted = LoraModel(below, out)
        models = {
            "base": ((name, below.tensor(name)) for name in below.shapes),
            "fine-tune": ((name, source.tensor(name)) for name in below.shapes),
            "adapter": ((name, adapted.tensor(name).to(below.dtype(name))) for name in below.shapes),
        }
        dtype = str(next(below.tensor(name).dtype for name in below.shapes)).removeprefix("torch.")
        for name, score in asked.of(models, sources.folder(origin), dtype, below.shapes):
            scores.append(Scored(name, score.total, score.stderr, {task: {**of} for task, of in score.tasks.items()}))
        facts = json.loads((out / REPORT).read_text())
        facts["scores"] = {of.model: {"score": of.score, "stderr": of.stderr, "tasks": of.tasks} for of in scores}
        write_whole(out / REPORT, (json.dumps(facts, indent=2) + "\n").encode())
    return Extraction(report, scores)


def _check_vocabulary(tuned: ModelReference, mine: Shapes, origin: ModelReference, theirs: Shapes) -> None:
    """Raise SourceError for other rows of the embeddings, and a head that the base lacks."""
    for name in (name for name in mine if VOCABULARY.search(name)):
        if name not in theirs:
            raise SourceError(
                f"{tuned} has an output head of its own ({name}) and {origin} uses its embeddings as the head; an"
                " adapter cannot part them"
            )
        if mine[name] != theirs[name] and mine[name][1:] == theirs[name][1:]:
            raise SourceError(
                f"{name} has {mine[name][0]} rows in {tuned} and {theirs[name][0]} in {origin}; an adapter cannot"
                " add or remove tokens"
            )


def _check_computes_alike(tuned: ModelReference, origin: ModelReference, sources: Sources) -> None:
    """Raise SourceError where the configs let the same weights compute something else. Keys that only one of them has
    are of tools that wrote it.
    """
    from transformers import AutoConfig  # takes a second

    configs = (load_pretrained(AutoConfig, sources.folder(of)).to_dict() for of in (tuned, origin))
    one, other = map(computing, configs)
    for mine, theirs in ((text_config(one), text_config(other)), (one, other)):
        for key in (key for key in mine if key in theirs):
            if mine[key] != theirs[key] and not (key.endswith("_config") and isinstance(mine[key], dict)):
                raise SourceError(
                    f"{tuned}: {key} is {mine[key]!r} in its config.json and {theirs[key]!r} in that of {origin}; an"
                    " adapter changes weights only, so that on this base it would be another model"
                )


def _reference(text: str) -> ModelReference:
    try:
        return ModelReference.parse(text)
    except ValueError:
        raise SourceError(f"{text!r} is not a model reference; write MODEL or MODEL+ADAPTER") from None
