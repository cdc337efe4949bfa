"""A small mixture of experts made dense by each way: the best of a search over mixtures of the quickstart's experts.

    llmevo run configs/quickstart-moe.yml --out runs/quickstart-moe
    llmevo export runs/quickstart-moe MIXTURE
    python benchmarks/dense.py collect MIXTURE FOLDER --out FILE    # continues where it stopped
    python benchmarks/dense.py table benchmarks/results/dense.jsonl
    python benchmarks/dense.py use benchmarks/results/dense.jsonl

`collect` makes MIXTURE dense by each way of `llmevo dense`, with its use on the search questions, and by RegMean over
its experts (`MIXTURE#expert=0` …) with the base of the quickstart, measured on the search questions of their tasks. The
models are written to FOLDER, and each is asked the held-out questions. `table` shows the scores next to those of the
quickstart's dense searches; `use` which experts the mixture uses for what. The file is of `--limit 64`: 64 held-out
questions a task.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measurements
import quickstart
import torch
from measurements import QUICKSTART, SKILLS

from llmevo.config import read_config
from llmevo.engines.hf import HfEngine
from llmevo.export.dense import Way, make_dense
from llmevo.export.merge import merge
from llmevo.merging.recipe import Recipe
from llmevo.models.references import ModelReference
from llmevo.run.calibration.router_use import router_use
from llmevo.run.scorer import Scorer

SEARCHES = {
    "search": measurements.ROOT / "benchmarks" / "results" / "quickstart-plain.jsonl",
    "search of prepared experts": measurements.ROOT / "benchmarks" / "results" / "quickstart.jsonl",
}
"""The runs of the dense searches; the first of each file is shown, on the same questions."""
ROWS: Mapping[str, tuple[Way, dict[str, Any]]] = {
    "widening, 2 experts a layer": ("widen", {"experts": 2}),
    "widening, 4 experts a layer": ("widen", {"experts": 4}),
    "average by the routers' use": ("average", {}),
    "uniform average": ("uniform", {}),
    **{f"expert {place}: {skill}": ("expert", {"expert": place}) for place, skill in enumerate(SKILLS)},
}
MIXTURE = "the mixture"
REGMEAN = "RegMean over the experts"
USE = "all"
"""The line with the use on the questions of all tasks."""


def collect(options: argparse.Namespace) -> None:
    """Measure what the file lacks."""
    torch.set_num_threads(1)
    scorer = Scorer(read_config(QUICKSTART), QUICKSTART.parent)
    folder = options.mixture.absolute()
    options.folder.mkdir(parents=True, exist_ok=True)
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
    if MIXTURE not in done:
        _ask(scorer, MIXTURE, folder, options)
    for name, (way, given) in ROWS.items():
        if name not in done:
            made = options.folder / name.replace(" ", "-").replace(":", "").replace(",", "").replace("'", "")
            if not made.exists():
                used = texts.absolute() if way in ("average", "widen") else None
                make_dense(str(folder), made, way, text=used, device="cpu", **given)
            _ask(scorer, name, made, options)
    if REGMEAN not in done:
        made = options.folder / "regmean"
        if not made.exists():
            merge(_by_regmean(scorer, folder, texts.absolute()), made, root=scorer.root)
        _ask(scorer, REGMEAN, made, options)


def _by_regmean(scorer: Scorer, mixture: Path, texts: Path) -> Recipe:
    """The sum of the mixture's experts as models, prepared by RegMean."""
    base = scorer.config.genome.base_model
    assert base
    experts = {f"{mixture}#expert={place}": skill for place, skill in enumerate(SKILLS)}
    tasks = {of: [task for task in scorer.texts.tasks if skill in task] for of, skill in experts.items()}
    return Recipe.model_validate(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": [{"model": of, "parameters": {"weight": 1.0}} for of in experts],
            "prepare": {"steps": ["regmean"], "text": str(texts), "tasks": tasks},
            "dtype": "bfloat16",
        }
    )


def _ask(scorer: Scorer, row: str, folder: Path, options: argparse.Namespace) -> None:
    """Ask a model the held-out questions."""
    evaluator = measurements.heldout(scorer.config, scorer.root, options.limit)
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
        "same": evaluator.clusters,
    }
    measurements.append(options.out, line)
    print(row, score.total, score.stderr, round(seconds), flush=True)


# The tables


def table(options: argparse.Namespace) -> None:
    """Markdown: held-out scores, next to those of the quickstart's rows."""
    lines = {line["row"]: line for line in measurements.read(options.file)}
    runs = {words: next(iter(quickstart.of_llmevo(measurements.read(of))), None) for words, of in SEARCHES.items()}
    print(measurements.made_on([*lines.values(), *filter(None, runs.values())]), end="\n\n")
    print("| model | parameters, 10⁶ | active, 10⁶ | held out | ± |\n|---|---:|---:|---:|---:|")
    for name in (MIXTURE, *ROWS, REGMEAN):
        if name in lines:
            line = lines[name]
            sizes = f"{line['parameters'] / 1e6:.0f} | {line['active'] / 1e6:.0f}"
            print(f"| {name} | {sizes} | {line['score']:.1%} | {line['stderr']:.1%} |")
    count = len(next(iter(lines[MIXTURE]["items"].values()))) if MIXTURE in lines else None
    size = min(line["parameters"] for line in lines.values() if "parameters" in line) / 1e6
    for words, run in runs.items():
        if run is None:
            continue
        rows = [{**row, "right": {task: own[:count] for task, own in row["right"].items()}} for row in run["rows"]]
        run = {**run, "questions": {task: own[:count] for task, own in run["questions"].items()}, "rows": rows}
        answers = {called: row["right"] for called, row in quickstart.rivals(run).items()}
        for called, right in {**answers, "the best merge found": quickstart.best_merge(run)}.items():
            score, error = quickstart.score(run, right)
            print(f"| {words}: {called} | {size:.0f} | {size:.0f} | {score:.1%} | {error:.1%} |")


def use(options: argparse.Namespace) -> None:
    """Markdown: the mean weight that the mixture gives each expert, task by task."""
    print(f"| questions | {' | '.join(SKILLS)} |\n|---|{'---:|' * len(SKILLS)}")
    for line in measurements.read(options.file):
        if "shares" in line:
            print(f"| {line['row']} | {' | '.join(f'{share:.2f}' for share in line['shares'])} |")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("mixture", type=Path, help="an exported mixture")
    collecting.add_argument("folder", type=Path, help="where the dense models are written")
    collecting.add_argument("--out", type=Path, required=True)
    collecting.add_argument("--limit", type=int, help="held-out questions a task; all by default")
    collecting.set_defaults(action=collect)
    for name, action in (("table", table), ("use", use)):
        reading = commands.add_parser(name)
        reading.add_argument("file", type=Path)
        reading.set_defaults(action=action)
    return made


def main() -> None:
    options = parser().parse_args()
    options.action(options)


if __name__ == "__main__":
    main()
