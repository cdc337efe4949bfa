"""Routers of the quickstart's mixture in closed form: ridge regression, which llmevo has, beside a linear discriminant.

    python benchmarks/routers.py collect --out benchmarks/results/routers.jsonl
    python benchmarks/routers.py table benchmarks/results/routers.jsonl

`collect` fits the directions of both kinds on what a router sees of the search questions, in the uniform merge and in
the sum of experts prepared by RegMean, and measures on held-out questions, in the latter, how many tokens have the
highest logit for the expert of their task, in the mean over layers. The discriminant is (S + λI)⁻¹(mₑ - m), with the
mean mₑ of the inputs of each expert's questions, their mean m, the covariance S within the questions of an expert and
the regression's λ; like the regression it has no intercept, as routers have none.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import measurements
import torch
from torch import Tensor

from llmevo.config import read_config
from llmevo.engines.hf import HfEngine
from llmevo.merging.merger import Merger
from llmevo.merging.mixture.router import RIDGE, Inputs, Router, fit
from llmevo.merging.recipe import Recipe
from llmevo.run.calibration.activations import batches, layers_of, watched
from llmevo.run.calibration.routers import inputs_of
from llmevo.run.scorer import Scorer

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart-moe.yml"
KINDS = {"ridge": "ridge regression", "discriminant": "linear discriminant"}
MERGES = {"uniform": "the uniform merge", "prepared": "the prepared experts' sum"}


def collect(options: argparse.Namespace) -> None:
    """Append a line."""
    torch.set_num_threads(1)
    config = read_config(CONFIG)
    scorer = Scorer(config.model_copy(update={"limit": options.texts}), CONFIG.parent)
    space = scorer.space
    assert space.routing
    skills = [space.names[expert] for expert in space.routing.experts]
    texts, right = _labelled(scorer.texts.tasks, skills)
    scores = torch.nn.functional.one_hot(right, len(skills)).float()
    dense = {
        "uniform": space.decode(space.uniform()).model_copy(update={"mixture": None, "prepare": None}),
        "prepared": scorer.localized(space.typical.model_copy(update={"mixture": None})),
    }
    routers: dict[str, Router] = {}
    engine = _engine(scorer, dense["uniform"])
    for name, recipe in dense.items():
        engine.swap(recipe.model_copy(update={"dtype": "float32"}))
        inputs = inputs_of(engine, texts)
        routers[f"ridge {name}"] = fit(inputs, scores)
        routers[f"discriminant {name}"] = discriminant(inputs, right)
    asked = Scorer(config.model_copy(update={"tasks": config.heldout_tasks, "limit": options.heldout}), CONFIG.parent)
    heldout, wanted = _labelled(asked.texts.tasks, skills)
    found = _right(engine, routers, heldout, wanted)
    line = {"search": len(texts), "heldout": len(heldout), "right": found}
    measurements.append(options.out, {**measurements.environment(), **line})
    print(line, flush=True)


def _labelled(tasks: Mapping[str, Sequence[str]], skills: Sequence[str]) -> tuple[list[str], Tensor]:
    """All questions, and the place of the expert that each one's task is for."""
    places = [next(place for place, skill in enumerate(skills) if skill in task) for task in tasks for _ in tasks[task]]
    return [text for texts in tasks.values() for text in texts], torch.tensor(places)


def _engine(scorer: Scorer, recipe: Recipe) -> HfEngine:
    folder = scorer.sources.engine_folder(recipe.donor)
    return HfEngine(folder, scorer.tokenizer_folder, "float32", None, Merger(scorer.sources))


def discriminant(inputs: Sequence[Inputs], right: Tensor) -> Router:
    """Directions by linear discriminants (Fisher 1936, https://doi.org/10.1111/j.1469-1809.1936.tb02137.x)."""
    belongs = torch.nn.functional.one_hot(right).double()
    directions: list[Tensor] = []
    for of in inputs:
        counts = belongs.T @ of.tokens
        means = (belongs.T @ of.sums) / counts[:, None]
        total = of.gram / counts.sum()
        within = total - (means.T * (counts / counts.sum())) @ means
        within += RIDGE * total.trace() / len(total) * torch.eye(len(total), dtype=total.dtype)
        directions.append(torch.linalg.solve(within, (means - means.mean(0)).T).T.float())
    return Router(torch.stack(directions))


@torch.no_grad()
def _right(engine: HfEngine, routers: Mapping[str, Router], texts: Sequence[str], right: Tensor) -> dict[str, float]:
    """The share of tokens, over all layers, with the highest logit for the right expert."""
    hits, tokens, place = dict.fromkeys(routers, 0), 0, [0]
    groups = batches(engine, texts, "the texts")

    def add(layer: int, given: Tensor) -> None:
        nonlocal tokens
        wanted = right[torch.tensor(groups[place[0]][0])][:, None]
        tokens += given.shape[0] * given.shape[1]
        for name, router in routers.items():
            logits = given.float().cpu() @ router.directions[layer].T
            hits[name] += int((logits.argmax(-1) == wanted).sum())

    with watched({number: layer.mlp for number, layer in enumerate(layers_of(engine.model))}, add):
        for place[0], (_, group) in enumerate(groups):
            engine.model(input_ids=group.to(engine.device), use_cache=False)
    return {name: count / tokens for name, count in hits.items()}


def table(options: argparse.Namespace) -> None:
    """Markdown: the share of tokens that would be sent to the right expert first."""
    line = measurements.read(options.file)[-1]
    print(f"| directions | {' | '.join(f'fitted in {called}' for called in MERGES.values())} |\n|---|---:|---:|")
    for kind, called in KINDS.items():
        shares = [line["right"][f"{kind} {merge}"] for merge in MERGES]
        print(f"| {called} | {' | '.join(f'{share:.3f}' for share in shares)} |")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("--out", type=Path, required=True)
    collecting.add_argument("--texts", type=int, default=64, help="search questions a task")
    collecting.add_argument("--heldout", type=int, default=48, help="held-out questions a task")
    collecting.set_defaults(command=collect)
    printing = commands.add_parser("table")
    printing.add_argument("file", type=Path)
    printing.set_defaults(command=table)
    return made


def main() -> None:
    options = parser().parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
