"""What every edit of the layers of the quickstart's experts does, and what a path costs the transformers engine.

    python benchmarks/scan.py scan FOLDER --out benchmarks/results/scan.jsonl [--limit 32] [--of NAME]
    python benchmarks/scan.py scan FOLDER --out FILE --model MODEL [--tasks arithmetic,family] [--step 2]
    python benchmarks/scan.py swap --out benchmarks/results/path-swap.jsonl [--rounds 5] [--vllm]
    python benchmarks/scan.py time --out benchmarks/results/path-time.jsonl [--rounds 5]
    python benchmarks/scan.py table benchmarks/results/scan.jsonl
    python benchmarks/scan.py table benchmarks/results/path-swap.jsonl
    python benchmarks/scan.py table benchmarks/results/path-time.jsonl

`scan` is `llmevo scan configs/quickstart-plain.yml --out FOLDER`, which goes on after a stop; its rows become one line.
With `--model` it is the scan of that model alone, such as a GGUF file, on the quickstart's questions.
`swap` lets a weight merge, the path of a weight merge, and another path of the same one alternate, after a round that
is not kept: every weight merge is a new one. Bytes are those of the model's weights in memory, each counted once.
`time` measures what the size `time` computes: seconds of the processor for a token that is read and one that is
written, of paths of several depths in turn.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import measurements
from measurements import QUICKSTART
from tables import rows, spread

PATHS = ("merge 0-24 | merge 16-24 gain 0.5 | merge 24-30", "merge 0-20 | merge 12-20 gain 0.5 | merge 20-30")
"""A path of a new weight merge, 38 layers, and one that differs in the block that it repeats."""
KINDS = {"weights": "weight merge", "path": "path of a new weight merge", "edit": "another path of the same one"}
DEPTHS = {24: "merge 0-12 | merge 18-30", 30: "merge 0-30", 36: "merge 0-18 | merge 12-30"}
READ, WRITTEN = 256, 48
"""Tokens of a round of `time`."""
BEST = 5


def scan(given: argparse.Namespace) -> None:
    """Scan to the end, and append a line."""
    from llmevo.config import parse_config
    from llmevo.models.yaml import read_yaml
    from llmevo.run.scan import Scan

    raw: Any = read_yaml(QUICKSTART.read_text())
    if given.model:
        raw["genome"] = {"models": [f"{given.model.absolute()}"], "merge_method": "linear"}
    if given.tasks:
        raw["tasks"] = [{"name": f"quickstart_{task}", "weight": 1.0} for task in given.tasks.split(",")]
    folder, out, limit = given.folder, given.out, given.limit
    found = Scan(parse_config(raw, QUICKSTART.name), QUICKSTART.parent, folder, given.of, limit, given.step)
    found.run(lambda scan, row: print(len(scan.rows), scan.left, row.path, f"{row.effect:+.4f}", flush=True))
    line: dict[str, Any] = {"benchmark": "scan", "of": found.of, "limit": limit, "step": given.step}
    line |= {
        "seconds": sum(row.seconds for row in found.rows),
        "peak": measurements.peak(),
        "questions": dict(found.questions),
    }
    line |= {"rows": [asdict(row) for row in found.rows]}
    measurements.append(out, line | measurements.environment())


def swap(out: Path | None, rounds: int, vllm: bool) -> None:
    """Time swaps in turn, and append a line for each."""
    from llmevo.config import read_config
    from llmevo.engines.hf import HfEngine
    from llmevo.engines.vllm import VllmEngine, deepened
    from llmevo.merging.merger import Merger
    from llmevo.models.sources import Sources
    from llmevo.search.space import SearchSpace

    config = read_config(QUICKSTART)
    sources = Sources.open(config.genome.references, QUICKSTART.parent)
    donor, dtype = config.genome.references[0], config.genome.dtype
    space, cache = SearchSpace(config.genome, sources.depth(donor)), config.engine.cache_gb
    folder, tokenizer = sources.engine_folder(donor), sources.folder(donor)
    if vllm:
        deep = deepened(space.alone(donor), sources, 38)
        options = {"max_model_len": 512}
        engine: Any = VllmEngine(deep, tokenizer, dtype, sources.root, 0, cache, options, base=sources.base, deepest=38)
    else:
        engine = HfEngine(folder, tokenizer, dtype, merger=Merger(sources, 0, cache))
    for turn in range(rounds + 1):
        genes = [
            space.clamp({name: of + 0.01 * (2 * turn + i) for name, of in space.uniform().items()}) for i in (0, 1)
        ]
        recipes = {
            "weights": space.decode(genes[0]),
            "path": space.decode(genes[1], PATHS[0]),
            "edit": space.decode(genes[1], PATHS[1]),
        }
        for kind, recipe in recipes.items():
            begun = time.perf_counter()
            engine.swap(recipe)
            seconds = time.perf_counter() - begun
            line = {"benchmark": "path swap", "backend": "vllm" if vllm else "hf", "kind": kind, "round": turn}
            line |= {"seconds": seconds, "bytes": 0 if vllm else _bytes(engine.model)}
            if turn:
                measurements.append(out, line | measurements.environment())
            print(line, flush=True)
    engine.close()


def token_times(out: Path | None, rounds: int) -> None:
    """Time tokens on paths of several depths in turn, and append a line for each."""
    import torch

    from llmevo.config import read_config
    from llmevo.run.scorer import Scorer

    config = read_config(QUICKSTART)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"self_check": False})})
    scorer = Scorer(config, QUICKSTART.parent)
    active, head = scorer.active_parameters
    tokens = torch.arange(1000, 1000 + READ).unsqueeze(0)
    uniform = scorer.space.uniform()
    for turn in range(rounds + 1):
        for depth, path in DEPTHS.items():
            engine: Any = scorer.engine
            engine.swap(scorer.space.decode(uniform, path))
            model = engine.model
            spent: dict[str, float] = {}
            with torch.inference_mode():
                begun = _spent()
                model(input_ids=tokens, use_cache=False, logits_to_keep=READ)
                spent["read"] = (_spent() - begun) / READ
                begun = _spent()
                options = {"min_new_tokens": WRITTEN, "max_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0}
                model.generate(tokens[:, :8], attention_mask=torch.ones(1, 8), **options)
                spent["written"] = (_spent() - begun) / WRITTEN
            computed = (head + depth * active[0]) / (head + sum(active))
            line = {"benchmark": "path time", "round": turn, "layers": depth, "computed": computed, "seconds": spent}
            if turn:
                measurements.append(out, line | measurements.environment())
            print(line, flush=True)


def _spent() -> float:
    """Seconds of the processor: those of other processes do not count."""
    return time.process_time()


def _bytes(model: Any) -> int:
    return sum({weight.data_ptr(): weight.nbytes for weight in model.parameters()}.values())


def table(file: Path) -> str:
    """The lines of a file as Markdown."""
    lines = measurements.read(file)
    if not lines:
        return ""
    tables: dict[str, Any] = {"scan": lambda: _scan(lines[-1]), "path swap": lambda: _swaps(lines)}
    return "\n".join({**tables, "path time": lambda: _times(lines)}[lines[-1]["benchmark"]]())


def _times(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        f"Time for a token, of that with 30 layers; {READ} tokens read together and {WRITTEN} written one by one,"
        f" seconds of the processor, medians of {max(line['round'] for line in lines)} rounds;"
        f" {' and '.join(measurements.machines(lines))}."
    )
    yield ""

    def seconds(depth: int, kind: str) -> float:
        return median(line["seconds"][kind] for line in lines if line["layers"] == depth)

    cells: list[list[str]] = []
    for depth in DEPTHS:
        computed = next(line["computed"] for line in lines if line["layers"] == depth)
        measured = (seconds(depth, kind) / seconds(30, kind) for kind in ("read", "written"))
        cells.append([f"{depth}", f"{computed:.2f}", *(f"{share:.2f}" for share in measured)])
    yield from rows(["layers", "computed", "read", "written"], cells)


def _scan(line: Mapping[str, Any]) -> Iterator[str]:
    from llmevo.run.scan import Row, luck

    found = [Row(**row) for row in line["rows"]]
    models = [row for row in found if row.kind == "model"]
    edits = sorted((r for r in found if r.kind != "model" and r.score is not None), key=lambda row: -row.effect)
    asked = " and ".join(sorted({str(count) for count in line["questions"].values()}))
    yield f"Mean probability of right answers, {asked} questions of each of {len(line['questions'])} tasks."
    yield ""
    cells = [(f"`{row.path}`", f"{row.score:.3f} ± {row.stderr:.3f}", f"{row.right:.0%}") for row in models]
    yield from rows(["model", "probability", "right choices"], cells)
    yield ""
    yield f"Effects of {len(edits)} edits of `{line['of']}`, by kind and number of layers:"
    yield ""
    groups: dict[str, list[Row]] = {}
    for row in found:
        if row in edits:
            groups.setdefault(row.group, []).append(row)
    head = ["edit", "blocks", "mean effect", "best", "worst", "better by 2 errors", "worse by 2 errors"]
    yield from rows(head, [_group(name, own) for name, own in groups.items()])
    yield ""
    by_chance = f"{luck(len(edits)):.1f} errors"
    ranks = [
        _rank_correlation([row.right for row in edits], of)
        for of in ([r.effect for r in edits], [r.nats for r in edits])
    ]
    yield (
        f"Rank correlation of the edits' effects with their right choices on the same questions: {ranks[0]:.2f} of the"
        f" probability, {ranks[1]:.2f} of the log-probability."
    )
    yield ""
    yield f"The {BEST} best; of as many edits without an effect the best one stands out by up to {by_chance}:"
    yield ""
    cells = [(f"`{row.path.replace('|', chr(92) + '|')}`", f"{row.effect:+.3f} ± {row.stderr:.3f}") for row in edits]
    yield from rows(["path", "effect"], cells[:BEST])


def _rank_correlation(ones: Sequence[Any], others: Sequence[Any]) -> float:
    from scipy.stats import spearmanr

    found: Any = spearmanr(ones, others)
    return float(found.statistic)


def _group(name: str, own: Sequence[Any]) -> list[str]:
    best, worst = max(own, key=lambda row: row.effect), min(own, key=lambda row: row.effect)
    ends = [f"{row.effect:+.3f} ({row.start}-{row.stop})" for row in (best, worst)]
    clear = [sum(sign * row.effect > 2 * row.stderr for row in own) for sign in (1, -1)]
    return [name, str(len(own)), f"{mean(row.effect for row in own):+.3f}", *ends, *map(str, clear)]


def _swaps(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"Seconds a swap, median (least to greatest), {' and '.join(measurements.machines(lines))}."
    yield ""
    cells: list[list[str]] = []
    for backend in dict.fromkeys(line["backend"] for line in lines):
        own = [line for line in lines if line["backend"] == backend]
        plain = median(line["seconds"] for line in own if line["kind"] == "weights")
        for kind, words in KINDS.items():
            some = [line for line in own if line["kind"] == kind]
            seconds = [line["seconds"] for line in some]
            size = f"{some[-1]['bytes'] / 1e6:.0f} MB" if some[-1]["bytes"] else ""
            cells.append([backend, words, spread(seconds), f"{median(seconds) / plain:.2f}", size])
    yield from rows(["engine", "swap to", "seconds", "of a weight merge's", "weights in memory"], cells)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = made.add_subparsers(dest="part", required=True)
    one = parts.add_parser("scan")
    one.add_argument("folder", type=Path)
    one.add_argument("--limit", type=int, default=32)
    one.add_argument("--of", default="")
    one.add_argument("--step", type=int, default=1)
    one.add_argument("--model", type=Path)
    one.add_argument("--tasks", default="")
    other = parts.add_parser("swap")
    other.add_argument("--rounds", type=int, default=5)
    other.add_argument("--vllm", action="store_true", help="vLLM with 38 layers instead of transformers")
    timing = parts.add_parser("time")
    timing.add_argument("--rounds", type=int, default=5)
    for part in (one, other, timing):
        part.add_argument("--out", type=Path, help="a file to append to, as lines of JSON")
    last = parts.add_parser("table")
    last.add_argument("file", type=Path)
    return made


def main() -> None:
    given = parser().parse_args()
    if given.part == "scan":
        scan(given)
    elif given.part == "time":
        token_times(given.out, given.rounds)
    elif given.part == "swap":
        swap(given.out, given.rounds, given.vllm)
    else:
        print(table(given.file))


if __name__ == "__main__":
    main()
