"""Model cards as the Hugging Face hub reads them: metadata, models with their licences, recipe, scores."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData

from llmevo.export.lora import REPORT, LoraReport
from llmevo.export.pack import local_paths
from llmevo.merging.recipe import Recipe
from llmevo.models.licences import strictest
from llmevo.models.references import PACKAGE, ModelReference
from llmevo.models.sources import Sources

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")

Relation = Literal["merge", "adapter", "quantized"]
"""The hub's `base_model_relation`."""

LIBRARIES = {"adapter": "peft"}


@dataclass(frozen=True)
class Parent:
    """A model that another is made of."""

    reference: str
    revision: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Metadata:
    """What the hub reads of a card, above its text."""

    parents: Sequence[Parent]
    relation: Relation = "merge"
    local: Sequence[str] = ()
    """Paths among the parents that exist on one machine only."""
    name: str = ""
    """The model's name in its results."""
    results: Sequence[EvalResult] = ()
    library: str = ""
    pipeline: str = "text-generation"
    tags: Sequence[str] = ()
    base: Sequence[str] | None = None
    """The hub ids of `base_model` where they are not those of all parents."""
    notes: list[str] = field(default_factory=list[str])
    """Sentences about what is left out; filled by `to_yaml`."""

    @property
    def base_models(self) -> list[str]:
        """The parents' hub ids, models and adapters, each once and without revisions."""
        if self.base is not None:
            return [*self.base]
        parts = [part for parent in self.parents for part in parent.reference.split("+") if part not in self.local]
        names = [part.partition("#")[0].partition("@")[0] for part in parts if not part.startswith(PACKAGE)]
        names = ["/".join(name.split("/")[:2]) if name.endswith(".gguf") else name for name in names]
        return [*dict.fromkeys(name for name in names if HUB_ID.match(name) and not name.endswith(".gguf"))]

    def to_yaml(self) -> str:
        """Return the metadata between two lines `---`. `model-index` needs results and a name."""
        licence, note = strictest((parent.reference, parent.licence) for parent in self.parents)
        if note:
            self.notes.append(note)
        bases, more = self.base_models, dict[str, Any]()
        if bases:
            more["base_model_relation"] = self.relation
        if self.results:
            more |= {"eval_results": [*self.results], "model_name": self.name}
        data = ModelCardData(
            library_name=self.library or LIBRARIES.get(self.relation, "transformers"),
            tags=[*dict.fromkeys([*self.tags, "merge", "llmevo", "mergekit"])],
            license=licence,
            base_model=bases or None,
            pipeline_tag=self.pipeline,
            **more,
        )
        return f"---\n{data.to_yaml()}\n---\n"


def parents_of(references: Iterable[ModelReference], sources: Sources) -> list[Parent]:
    """Return models as parents, with the licences that their cards declare."""
    return [Parent(str(of), (of.lora or of.model).revision, sources.licence(of)) for of in references]


def pipeline(config: Mapping[str, Any]) -> str:
    """Return the hub's `pipeline_tag` of a model with this config."""
    return "image-text-to-text" if "vision_config" in config else "text-generation"


def models_table(parents: Iterable[Parent]) -> list[str]:
    """Return the table of models, revisions and licences in Markdown."""
    rows = [f"| `{of.reference}` | {of.revision or ''} | {of.licence or 'unknown'} |" for of in parents]
    return ["## Models", "", "| model | revision | licence |", "|---|---|---|", *rows, ""]


def merge_card(recipe: Recipe, sources: Sources, root: Path, relation: Relation = "merge", facts: str = "") -> str:
    """Return the README.md of a recipe that was merged. `facts` is a sentence on the format of the weights."""
    parents, base = parents_of(recipe.references, sources), sources.without_adapter(recipe.donor)
    local = [path for reference in (*recipe.references, base) for path in local_paths(reference, root)]
    data = Metadata(
        parents,
        relation,
        local,
        pipeline=pipeline(sources.config(recipe.donor)),
        base=Metadata([Parent(str(base))], local=local).base_models if relation == "adapter" else None,
    )
    head = data.to_yaml()
    methods = ", ".join(f"`{name}`" for name in dict.fromkeys(s.merge_method for s in recipe.slices or []) if name)
    lines = [
        "# A merge of language models",
        "",
        f"Merged by {methods or f'`{recipe.merge_method}`'} with llmevo. {facts}".rstrip(),
        *(["", *data.notes] if data.notes else []),
        "",
        *models_table(parents),
        *recipe_lines(recipe),
    ]
    return head + "\n".join(lines) + "\n"


def recipe_lines(recipe: Recipe) -> list[str]:
    """Return the recipe as a section in Markdown."""
    return ["## Recipe", "", "```yaml", recipe.to_yaml().rstrip(), "```", ""]


def adapter_card(
    sources: Sources,
    references: Iterable[ModelReference],
    base: ModelReference,
    report: LoraReport,
    stands_for: str,
) -> str:
    """Return the README.md of an adapter. `stands_for`: the model that it stands for, in words."""
    parents = parents_of(references, sources)
    local = local_paths(base, sources.root)
    data = Metadata(parents, "adapter", local, base=Metadata([Parent(str(base))], local=local).base_models)
    head = data.to_yaml()
    lines = [
        "# A LoRA adapter",
        "",
        f"On `{base}`, for {stands_for}, made with llmevo. {adapter_facts(report)}",
        *(["", *data.notes] if data.notes else []),
        "",
        *usage(str(base)),
        *models_table(parents),
    ]
    return head + "\n".join(lines)


def adapter_facts(report: LoraReport) -> str:
    """Return what an adapter holds, in sentences."""
    kept = "It is exact" if report.exact else f"It keeps {report.energy:.1%} of the squared singular values"
    parts = [
        f"{kept} (relative error {report.error:.2g}): {report.size}. `{REPORT}` has every matrix.",
        *(f"{limit}." for limit in report.limits),
    ]
    return " ".join(parts)


def usage(base: str) -> list[str]:
    """Return how an adapter is loaded, as a section in Markdown."""
    return [
        "```python",
        f'model = PeftModel.from_pretrained(base_model, "this folder")  # base_model: {base}',
        "```",
        "",
    ]


def results_of(tasks: Mapping[str, Mapping[str, float]], metrics: Mapping[str, str], split: str) -> list[EvalResult]:
    """Return the results of tasks for `model-index`. `metrics` is {task: the counted metric}."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=f"{task} ({split})",
            metric_type=metric.partition(",")[0],
            metric_value=round(float(values[metric]), 6),
        )
        for task, values in tasks.items()
        if (metric := metrics.get(task, "acc,none")) in values
    ]
