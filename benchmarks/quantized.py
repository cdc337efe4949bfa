"""Whether the best merges are the best after quantization: recipes of a run, scored as they are and as they are served.

    python benchmarks/quantized.py measure benchmarks/results/quickstart-llm/seed-1.jsonl --out FILE [--recipes 8]
    python benchmarks/quantized.py table benchmarks/results/quantized.jsonl
    python benchmarks/quantized.py files benchmarks/results/quickstart-llm/seed-1.jsonl --out FILE
    python benchmarks/quantized.py replies benchmarks/results/gguf-files.jsonl

`measure` merges the best recipes of the log by their search scores and scores each on the held-out questions in every
format: with `engine.quantize` the engine has these same weights. It goes on where an earlier call has stopped. `table`
gives the scores and how far the rankings agree; intervals are 95 %, from a bootstrap of the questions, where a question
that two tasks ask is drawn once.

`files` writes the best merge of the log as GGUF files, reads each with transformers and asks it and the merge the same
held-out questions, greedily; `replies` prints how many replies are equal.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import measurements
import numpy as np
import tables
from measurements import QUICKSTART
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

PLAIN = "bfloat16"
FORMATS = (PLAIN, "q8_0", "q4_0", "fp8")
DRAWS = 4000

Numbers = NDArray[np.float64]


def measure(log: Path, out: Path, recipes: int, limit: int | None, formats: Sequence[str]) -> None:
    """Append a line for each recipe and format."""
    from llmevo.config import read_config
    from llmevo.engines.hf import HfEngine
    from llmevo.merging.merger import Merger
    from llmevo.merging.recipe import Recipe
    from llmevo.models.sources import Sources
    from llmevo.run.log.state import RunState
    from llmevo.run.log.storage import read_log

    config, state = read_config(QUICKSTART), RunState.fold(iter(read_log(log)))
    sources = Sources(QUICKSTART.parent)
    folder = sources.folder(config.genome.references[0])
    evaluator = measurements.heldout(config, QUICKSTART.parent, limit)
    engine = HfEngine(folder, folder, config.genome.dtype, merger=Merger(sources, 0))
    known = {(line["log"], line["candidate"], line["format"]) for line in measurements.read(out)}
    for trial in state.asked_all[:recipes]:
        number = trial.candidate.id
        recipe = Recipe.model_validate(state.recipes[number])
        for form in formats:
            if (log.stem, number, form) in known:
                continue
            engine.swap(recipe, "" if form == PLAIN else form)
            started = time.monotonic()
            score = evaluator.score(engine.lm)
            line: dict[str, Any] = {"benchmark": "quantized", "log": log.stem, "candidate": number, "format": form}
            line |= {"search": trial.value, "score": score.total, "seconds": round(time.monotonic() - started, 1)}
            line |= {"weights": {task.name: task.weight for task in config.heldout}}
            line |= {"items": {task: [*map(float, of)] for task, of in score.item_scores.items()}}
            line |= {"same": evaluator.clusters}
            measurements.append(out, line | measurements.environment())
            print(log.stem, number, form, f"{score.total:.4f}", line["seconds"], flush=True)


def files(log: Path, out: Path, questions: int, tokens: int) -> None:
    """Append a line for each type of GGUF file."""
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    import llmevo
    from llmevo.export.gguf import TYPES
    from llmevo.merging.recipe import Recipe
    from llmevo.models.quantize import quantizer
    from llmevo.run.log.state import RunState
    from llmevo.run.log.storage import read_log

    state = RunState.fold(iter(read_log(log)))
    recipe = Recipe.model_validate(state.recipes[state.asked_all[0].candidate.id])
    held = sorted((QUICKSTART.parent / "quickstart" / "tasks").glob("*.heldout.jsonl"))
    asked = [json.loads(line)["question"] for file in held for line in file.read_text().splitlines()[:questions]]

    def load(folder: Path, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        llmevo.merge(recipe, root / "merge", root=QUICKSTART.parent)
        tokenizer: Any = AutoTokenizer.from_pretrained(root / "merge")

        def replies(model: Any) -> list[str]:
            found: list[str] = []
            for question in asked:
                turn = [{"role": "user", "content": question}]
                inputs = tokenizer.apply_chat_template(
                    turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
                made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
                found.append(tokenizer.decode(made[0][inputs["input_ids"].shape[1] :]))
            return found

        plain = load(root / "merge")
        wanted, config = replies(plain), plain.config.to_dict()
        for form in TYPES:
            llmevo.merge(recipe, root / form, as_=f"gguf:{form}", root=QUICKSTART.parent)
            (file,) = (root / form).glob("*.gguf")
            read = load(file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True))
            found, served = replies(read), load(root / "merge")
            if form in FORMATS:
                rounding = quantizer(form, {name: of.shape for name, of in served.state_dict().items()}, config)
                for name, weight in served.named_parameters():
                    weight.data = rounding.rounded(name, weight.data)
            else:
                served.to(getattr(torch, {"f16": "float16", "bf16": "bfloat16"}[form])).float()
            state_dict = served.state_dict()
            line: dict[str, Any] = {"benchmark": "gguf-files", "log": log.stem, "type": form, "questions": len(asked)}
            line |= {
                "weights": all(torch.equal(of, state_dict[name]) for name, of in read.state_dict().items()),
                "as_scored": sum(map(str.__eq__, found, replies(served))),
                "as_merged": sum(map(str.__eq__, found, wanted)),
                "bytes": file.stat().st_size,
            }
            measurements.append(out, line | measurements.environment())
            print(line, flush=True)


def replies_table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How the files answer beside the merge, and beside the weights that a search in their format scores."""
    cells = [
        [
            f"`{line['type']}`",
            f"{line['bytes'] / 1e6:.0f} MB",
            "equal" if line["weights"] else "different",
            f"{line['as_scored']} of {line['questions']}",
            f"{line['as_merged']} of {line['questions']}",
        ]
        for line in lines
    ]
    heads = ["type", "file", "weights, to those scored in it", "equal replies, to those", "to the merge in bfloat16"]
    yield from tables.rows(heads, cells)


class Scores:
    """The scores of all recipes in all formats, of all questions and of bootstrap samples of these."""

    def __init__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        by = {(line["log"], line["candidate"], line["format"]): line for line in lines}
        self.formats = [form for form in FORMATS if any(key[2] == form for key in by)]
        every = dict.fromkeys(key[:2] for key in by)
        self.recipes = [of for of in every if all((*of, form) in by for form in self.formats)]
        first = lines[0]
        self.search = np.array([by[*of, PLAIN]["search"] for of in self.recipes])
        questions = 1 + max(max(own) for own in first["same"].values())
        random = np.random.default_rng(0)
        drawn = random.multinomial(questions, [1 / questions] * questions, size=DRAWS).astype(float)
        drawn = np.vstack([np.ones(questions), drawn])  # the first sample is the questions themselves
        scores = np.zeros((len(drawn), len(self.recipes), len(self.formats)))
        for task, weight in first["weights"].items():
            times = drawn[:, first["same"][task]]
            answers = np.array([[by[*of, form]["items"][task] for form in self.formats] for of in self.recipes])
            scores += weight * np.einsum("dq,rfq->drf", times, answers) / times.sum(1)[:, None, None]
        self.scores: Numbers = scores
        """(samples, recipes, formats); the first sample is the measurement."""

    def of(self, form: str) -> Numbers:
        return self.scores[:, :, self.formats.index(form)]


def interval(samples: Numbers, digits: int = 2) -> str:
    """The first sample's value, and in brackets the interval of the others."""
    low, high = np.nanquantile(samples[1:], [0.025, 0.975])
    return f"{samples[0]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def error(samples: Numbers, digits: int = 3) -> str:
    return f"{samples[0]:+.{digits}f} ± {samples[1:].std(ddof=1):.{digits}f}"


def correlations(of: Any, one: Numbers, other: Numbers) -> Numbers:
    """The rank correlation in every sample."""
    return np.array([of(a, b).statistic for a, b in zip(one, other, strict=True)])


def table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The scores, the cost of each format, and how far its ranking agrees with that of the plain merges."""
    found = Scores(lines)
    plain, served = found.of(PLAIN), [form for form in found.formats if form != PLAIN]
    asked = sum(map(len, lines[0]["same"].values()))
    yield f"{len(found.recipes)} recipes, {asked} held-out answers each; ± one standard error, differences are paired."
    yield ""
    cells: list[list[str]] = []
    for place in np.argsort(-plain[0]):
        log, number = found.recipes[place]
        own = [f"{found.of(form)[0, place]:.3f}" for form in found.formats]
        lost = [error(found.of(form)[:, place] - plain[:, place]) for form in served]
        cells.append([f"{log} #{number}", f"{found.search[place]:.3f}", *own, *lost])
    heads = ["recipe", "search score", *found.formats, *(f"{form} against {PLAIN}" for form in served)]
    yield from tables.rows(heads, cells)
    yield ""
    cells = []
    for form in served:
        other = found.of(form)
        gap = other - plain
        taus, rhos = correlations(kendalltau, plain, other), correlations(spearmanr, plain, other)
        # The best by plain scores, served, against the best by served scores: the choice is that of the sample.
        chosen, best = plain.argmax(1), other.argmax(1)
        samples = np.arange(len(plain))
        regret = other[samples, best] - other[samples, chosen]
        # The differences of single recipes around their mean, beyond what the questions' luck makes.
        spread = gap[0].std(ddof=1)
        luck = np.sqrt(np.mean((gap[1:] - gap[1:].mean(1, keepdims=True)).var(0, ddof=1)))
        cells.append(
            [
                form,
                error(gap.mean(1)),
                interval(taus),
                interval(rhos),
                "yes" if chosen[0] == best[0] else f"no, {regret[0]:.3f} better",
                f"{spread:.3f}, {luck:.3f} by luck",
            ]
        )
    heads = ["format", f"mean against {PLAIN}", "Kendall's τ", "Spearman's ρ", "same best", "spread of differences"]
    yield from tables.rows(heads, cells)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("log", type=Path, help="a run of the quickstart")
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--recipes", type=int, default=8)
    measuring.add_argument("--limit", type=int, default=None, help="questions a task; all by default")
    measuring.add_argument("--formats", default=",".join(FORMATS))
    writing = commands.add_parser("files")
    writing.add_argument("log", type=Path, help="a run of the quickstart")
    writing.add_argument("--out", type=Path, required=True)
    writing.add_argument("--questions", type=int, default=8, help="of each of the four skills")
    writing.add_argument("--tokens", type=int, default=12, help="of a reply")
    for name in ("table", "replies"):
        commands.add_parser(name).add_argument("file", type=Path)
    return made


def main() -> None:
    given = parser().parse_args()
    if given.command == "measure":
        measure(given.log, given.out, given.recipes, given.limit, given.formats.split(","))
    elif given.command == "files":
        files(given.log, given.out, given.questions, given.tokens)
    else:
        lines = measurements.read(given.file)
        print("\n".join((table if given.command == "table" else replies_table)(lines)))


if __name__ == "__main__":
    main()
