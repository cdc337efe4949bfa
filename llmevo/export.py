"""Write a merged model as a normal Hugging Face folder: whole, or not at all."""

import json
import re
import shutil
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from safetensors.torch import save_file
from torch import Tensor

from llmevo.errors import RunError, UserError
from llmevo.merging import depth_of, merge
from llmevo.recipe import Recipe
from llmevo.runlog import RunState
from llmevo.sources import Sources

SHARD_BYTES = 2 * 10**9
"""The size of a weight file at most; also what export keeps in memory."""

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")
CHAT_FILES = ("chat_template*",)
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w.-]+)?$")


def write_model(
    recipe: Recipe, sources: Sources, out: Path, seed: int = 0, extra: Mapping[str, str] | None = None
) -> None:
    """Merge into `out`: weights, config, generation config, tokenizer, the recipe, and `extra` text files.

    Raises UserError when `out` holds something already. Everything is written beside it and renamed at the end, so
    a full disk or a stop leaves nothing that looks whole.
    """
    with _whole_folder(out) as folder:
        dtypes = _write_weights(merge(recipe, sources, seed), folder)
        _write_config(recipe, sources, folder, dtypes)
        donor = sources.folder(recipe.tokenizer_donor)
        for pattern in (*TOKENIZER_FILES, *CHAT_FILES):
            for file in donor.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        for name, text in {"mergekit_config.yml": recipe.to_yaml(), **(extra or {})}.items():
            (folder / name).write_text(text)


def export_run(state: RunState, sources: Sources, out: Path, candidate: int | None = None) -> Recipe:
    """Export a run's best, or one of its candidates, with its recipe and a model card."""
    started = state.started
    if started is None or not state.trials:
        raise RunError("the run has scored no candidate yet; go on with `llmevo resume`")
    best = state.best.candidate.id if state.best else None
    chosen = best if candidate is None else candidate
    if chosen not in state.recipes:
        raise RunError(f"--candidate {candidate}: the run has no such candidate; its ids are 0 to {max(state.recipes)}")
    recipe = Recipe.model_validate(state.recipes[chosen])
    extra = {"best.yml": recipe.to_yaml(), "README.md": model_card(state, recipe, chosen)}
    write_model(recipe, sources, out, started.seed, extra)
    return recipe


@contextmanager
def _whole_folder(out: Path) -> Generator[Path]:
    """A folder beside `out` that becomes it if nothing goes wrong, and is gone if something does."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error})") from error
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def _write_weights(weights: Iterator[tuple[str, Tensor]], folder: Path) -> set[str]:
    """One safetensors file, or several with an index, as transformers saves them. Returns the types of the weights."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    dtypes: set[str] = set()
    size = total = 0

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append([*pending])
        pending.clear()

    for name, weight in weights:
        if pending and size + weight.nbytes > SHARD_BYTES:
            flush()
            size = 0
        pending[name] = weight.contiguous()
        size, total = size + weight.nbytes, total + weight.nbytes
        dtypes.add(str(weight.dtype).removeprefix("torch."))
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return dtypes
    index: dict[str, str] = {}
    for place, names in enumerate(shards):
        file = f"model-{place + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{place}").rename(folder / file)
        index |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))
    return dtypes


def _write_config(recipe: Recipe, sources: Sources, folder: Path, dtypes: set[str]) -> None:
    """The donor's config with the result's type and depth, and its generation config."""
    config = sources.config(recipe.donor)
    if len(dtypes) == 1:
        config["dtype"] = next(iter(dtypes))
        config.pop("torch_dtype", None)
    depth = sum(of.depth for of in recipe.output_slices(depth_of(config)))
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if key in config:
            config[key] = depth
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = sources.folder(recipe.donor) / "generation_config.json"
    if generation.exists():
        shutil.copyfile(generation, folder / generation.name)


def model_card(state: RunState, recipe: Recipe, candidate: int) -> str:
    """What the model is made of and how well it does, for the model's README.md."""
    started = state.started
    assert started is not None
    trial = state.trials[candidate]
    licences = sorted({source["licence"] for source in started.sources if source["licence"]})
    parents = [str(reference) for reference in recipe.references]
    data = ModelCardData(
        library_name="transformers",
        tags=["merge", "llmevo", "mergekit"],
        license=licences[0] if len(licences) == 1 else None,
        base_model=[parent for parent in parents if HUB_ID.match(parent)] or None,
    )
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "# A merge found by llmevo",
        "",
        f"Candidate {candidate} of {len(state.trials)}, merged by `{recipe.merge_method}`; it came from"
        f" `{trial.candidate.origin}`. Search score {_score(trial.value, trial.score.stderr if trial.score else 0)}.",
        "",
        "## Models",
        "",
        "| model | revision | licence |",
        "|---|---|---|",
        *(f"| `{s['reference']}` | {s['revision'] or ''} | {s['licence'] or 'unknown'} |" for s in started.sources),
        "",
        *_heldout_table(state),
        "## Recipe",
        "",
        "```yaml",
        recipe.to_yaml().rstrip(),
        "```",
        "",
        f"Seed {started.seed}; " + ", ".join(f"{name} {number}" for name, number in started.versions.items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _heldout_table(state: RunState) -> Sequence[str]:
    rows: list[Any] = [*state.heldout.values()]
    if not rows:
        return []
    tasks = [*rows[0].tasks]
    config = state.started.config if state.started else {}
    metrics = {
        task["name"]: task.get("metric", "acc,none") for task in config.get("heldout", []) if isinstance(task, dict)
    }
    header = ["model", "score", *tasks]
    table = [header, ["---"] * len(header)]
    for row in rows:
        values = [f"{row.tasks[task][metrics.get(task, 'acc,none')]:.3f}" for task in tasks]
        table.append([f"{row.row}", _score(row.score, row.stderr), *values])
    note = "Questions that no choice was made by; ± is one standard error."
    return ["## Held-out score", "", note, "", *("| " + " | ".join(line) + " |" for line in table), ""]


def _score(value: float, stderr: float) -> str:
    return f"{value:.3f} ± {stderr:.3f}"
