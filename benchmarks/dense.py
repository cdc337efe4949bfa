"""A small mixture of experts made dense by each way: the quickstart's four experts.

    python benchmarks/dense.py collect FOLDER --out benchmarks/results/dense.jsonl    # continues where it stopped
    python benchmarks/dense.py table benchmarks/results/dense.jsonl
    python benchmarks/dense.py use benchmarks/results/dense.jsonl

`collect` writes a Mixtral to FOLDER: attention and norms of a merge of the four experts (task arithmetic, weight 0.71),
the MLPs of the four as its experts, two for each token, and routers by ridge regression of the question's skill on what
they see. It makes this mixture dense by each way of `llmevo dense`, with its use on the search questions, and asks each
model the held-out questions. `table` shows the scores next to the rows of the quickstart's searches in
`quickstart.jsonl`; `use` which experts the mixture uses for what.
"""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import measurements
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmevo.config import read_config
from llmevo.engines.hf import HfEngine
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.standard_errors import clusters
from llmevo.export.dense import Way, make_dense
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.models.references import ModelReference
from llmevo.run.routing import router_use
from llmevo.run.scorer import Scorer

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "quickstart-plain.yml"
SEARCHES = ROOT / "benchmarks" / "results" / "quickstart.jsonl"
SKILLS = ("arithmetic", "words", "family", "calendar")
COEFFICIENT = 0.71
SHARPNESS = 10.0
"""The factor of the regression's answers, which are about 1 for the right skill and 0 for others."""

RIDGE = 0.01
"""Relative to the mean square of a router's inputs."""

ROWS: Mapping[str, tuple[Way, dict[str, Any]]] = {
    "widening, 2 experts a layer": ("widen", {"experts": 2}),
    "widening, 4 experts a layer": ("widen", {"experts": 4}),
    "average by the routers' use": ("average", {}),
    "uniform average": ("uniform", {}),
    **{f"expert {place}: {skill}": ("expert", {"expert": place}) for place, skill in enumerate(SKILLS)},
}
MIXTURE = "the mixture"
USE = "all"
"""The line with the use on the questions of all tasks."""


def collect(options: argparse.Namespace) -> None:
    """Measure what the file lacks."""
    torch.set_num_threads(1)
    scorer = Scorer(read_config(CONFIG).model_copy(update={"limit": options.texts}), CONFIG.parent)
    folder = options.folder / "mixture"
    if not folder.exists():
        _build(scorer, folder)
        if options.one:
            return
    texts = options.folder / "questions.json"
    texts.write_text(scorer.texts.to_json())
    done = {line["row"] for line in measurements.read(options.out)}
    of = ModelReference.parse(str(folder))
    for task in [*scorer.texts.tasks, USE]:
        if task not in done:
            asked = scorer.texts if task == USE else scorer.texts.of([task])
            found = router_use(of, Path(), asked, "cpu")
            shares = [sum(row[place] for row in found.mean) / len(found.mean) for place in range(len(SKILLS))]
            more = {"table": vars(found)} if task == USE else {}
            measurements.append(options.out, {**measurements.environment(), "row": task, "shares": shares, **more})
            print(task, shares, flush=True)
            if options.one:
                return
    if MIXTURE not in done:
        _ask(scorer, MIXTURE, folder, options)
        if options.one:
            return
    for name, (way, given) in ROWS.items():
        if name not in done:
            made = options.folder / name.replace(" ", "-").replace(":", "").replace(",", "").replace("'", "")
            if not made.exists():
                make_dense(str(folder), made, way, text=texts.absolute(), device="cpu", **given)
            _ask(scorer, name, made, options)
            if options.one:
                return


def _ask(scorer: Scorer, row: str, folder: Path, options: argparse.Namespace) -> None:
    """Ask a model the held-out questions."""
    config = scorer.config
    protocol = replace(config.heldout_protocol, limit=options.limit)
    places = [scorer.root / place for place in config.task_search_path]
    evaluator = Evaluator(config.heldout_tasks, protocol, places, scorer.root)
    engine = HfEngine(folder, scorer.tokenizer_folder, "bfloat16", "cpu")
    started = time.monotonic()
    score = evaluator.score(engine.lm)
    seconds = time.monotonic() - started
    sizes = json.loads((folder / "config.json").read_text())
    parameters = sum(weight.numel() for weight in engine.model.parameters())
    routed = sum(w.numel() for n, w in engine.model.named_parameters() if ".experts." in n)
    unused = 1.0 - sizes.get("num_experts_per_tok", 1) / sizes.get("num_local_experts", 1)
    line = {
        **measurements.environment(),
        "row": row,
        "parameters": parameters,
        "active": parameters - round(routed * unused),
        "neurons": sizes["intermediate_size"],
        "seconds": seconds,
        "score": score.total,
        "stderr": score.stderr,
        "items": score.item_scores,
        "same": clusters(evaluator.texts()),
    }
    measurements.append(options.out, line)
    print(row, score.total, score.stderr, round(seconds), flush=True)


# The mixture


def _build(scorer: Scorer, folder: Path) -> None:
    """Write the mixture."""
    genome, sources = scorer.config.genome, scorer.sources
    experts = [next(of for of in genome.models if of.name == skill) for skill in SKILLS]
    models = [{"model": str(of), "parameters": {"weight": COEFFICIENT}} for of in experts]
    given = {"merge_method": "task_arithmetic", "base_model": str(genome.base_model), "models": models}
    rest = Recipe.model_validate({**given, "dtype": "bfloat16"})
    routers = _routers(scorer, rest)
    merger = Merger(sources)
    weights: dict[str, Tensor] = {n: w.clone() for n, w in merger.merge(rest) if ".mlp." not in n}
    for place, expert in enumerate(experts):
        for name, weight in merger.merge(Recipe.of_one(expert, "bfloat16")):
            before, dot, projection = name.partition(".mlp.")
            if dot:
                called = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[projection.removesuffix(".weight")]
                weights[f"{before}.block_sparse_moe.experts.{place}.{called}.weight"] = weight.clone()
    for layer, rows in enumerate(routers):
        weights[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = rows.bfloat16()
    assert genome.base_model
    config = sources.config(genome.base_model) | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": len(SKILLS),
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "dtype": "bfloat16",
    }
    folder.mkdir(parents=True)
    for file in scorer.tokenizer_folder.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def _routers(scorer: Scorer, recipe: Recipe) -> list[Tensor]:
    """The rows of each layer's router: ridge regression of the question's skill on what the router sees of a token."""
    engine = scorer.engine
    assert isinstance(engine, HfEngine)
    engine.swap(recipe)
    layers: Any = engine.model.model.layers
    width = int(engine.model.config.hidden_size)
    grams = torch.zeros(len(layers), width, width, dtype=torch.float64)
    crossed = torch.zeros(len(layers), width, len(SKILLS), dtype=torch.float64)
    seen: dict[int, Tensor] = {}
    handles = [
        layer.post_attention_layernorm.register_forward_hook(lambda _, __, out, n=n: seen.__setitem__(n, out))
        for n, layer in enumerate(layers)
    ]
    count = 0
    for task, texts in scorer.texts.tasks.items():
        skill = next(place for place, name in enumerate(SKILLS) if name in task)
        for text in texts:
            tokens = engine.lm.tokenizer(text, return_tensors="pt")["input_ids"]
            engine.model(input_ids=tokens, use_cache=False)
            count += tokens.numel()
            for n, out in seen.items():
                rows = out[0].double()
                grams[n] += rows.T @ rows
                crossed[n, :, skill] += rows.sum(0)
    for handle in handles:
        handle.remove()
    ridges = [RIDGE * float(gram.trace()) / width * torch.eye(width, dtype=torch.float64) for gram in grams]
    solved = zip(grams, ridges, crossed, strict=True)
    print(f"routers: {count} tokens", flush=True)
    return [SHARPNESS * torch.linalg.solve(gram + ridge, cross).T.float() for gram, ridge, cross in solved]


# The tables


def table(options: argparse.Namespace) -> None:
    """Markdown: held-out scores, next to those of the quickstart's rows."""
    lines = {line["row"]: line for line in measurements.read(options.file)}
    print("| model | parameters, 10⁶ | active, 10⁶ | held out | ± |\n|---|---:|---:|---:|---:|")
    for name in (MIXTURE, *ROWS):
        if name in lines:
            line = lines[name]
            sizes = f"{line['parameters'] / 1e6:.0f} | {line['active'] / 1e6:.0f}"
            print(f"| {name} | {sizes} | {line['score']:.1%} | {line['stderr']:.1%} |")
    import quickstart

    run = next(run for run in measurements.read(SEARCHES) if run["optimizer"] == "llm" and run["seed"] == 0)
    known = {row["kind"]: row for row in run["rows"]}
    rivals = quickstart.rivals(run)
    size = lines["uniform average"]["parameters"] / 1e6 if "uniform average" in lines else 0.0
    for words, row in {**rivals, "the best merge of the dense search": known["best"]}.items():
        score, error = quickstart.score(run, row["right"])
        called = f"{words}: {row['name']}" if words == "the best expert" else words
        print(f"| quickstart, {called} | {size:.0f} | {size:.0f} | {score:.1%} | {error:.1%} |")


def use(options: argparse.Namespace) -> None:
    """Markdown: the mean weight that the mixture gives each expert, task by task."""
    print(f"| questions | {' | '.join(SKILLS)} |\n|---|{'---:|' * len(SKILLS)}")
    for line in measurements.read(options.file):
        if "shares" in line:
            print(f"| {line['row']} | {' | '.join(f'{share:.2f}' for share in line['shares'])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("folder", type=Path)
    collecting.add_argument("--out", type=Path, required=True)
    collecting.add_argument("--limit", type=int, help="held-out questions a task; all by default")
    collecting.add_argument(
        "--texts", type=int, default=64, help="search questions a task, for the routers and their use"
    )
    collecting.add_argument("--one", action="store_true", help="stop after one step")
    collecting.set_defaults(action=collect)
    for name, action in (("table", table), ("use", use)):
        reading = commands.add_parser(name)
        reading.add_argument("file", type=Path)
        reading.set_defaults(action=action)
    options = parser.parse_args()
    options.action(options)


if __name__ == "__main__":
    main()
