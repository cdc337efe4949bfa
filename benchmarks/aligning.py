"""Whether the neurons of experts are aligned before they are averaged: small models of bytes, trained here.

    python benchmarks/aligning.py collect --out benchmarks/results/aligning.jsonl
    python benchmarks/aligning.py table benchmarks/results/aligning.jsonl

`collect` trains a model of bytes on pages of the documentation, and the MLPs of two experts on other parts of them, in
two ways. `of one start`: both begin with the model's MLPs, as fine-tunes of one model do. `of two starts`: each begins
with random MLPs of its own, as experts that were not made of one dense model. It then averages the two experts as they
are and aligned (`prepare: [align]`), and measures the bits that each model needs for a byte of pages it was not trained
on.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import measurements
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources

ROOT = Path(__file__).parent.parent
CONTEXT, BATCH, RATE = 128, 16, 2e-3
STARTS = ("of one start", "of two starts")
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}


def collect(options: argparse.Namespace) -> None:
    """Append a line for each way of training and seed."""
    torch.set_num_threads(1)
    pages = [page.read_bytes() for page in sorted((ROOT / "docs").rglob("*.md"))]
    read, unseen = [_bytes(pages[place::4]) for place in range(3)], _bytes(pages[3::4])
    done = {(line["start"], line["seed"]) for line in measurements.read(options.out)}
    for seed in range(options.seeds):
        if all((start, seed) in done for start in STARTS):
            continue
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
        _train(model, torch.cat(read), options.steps, [*model.parameters()])
        for start in STARTS:
            line = {"start": start, "seed": seed, "steps": options.steps, "model": _bits(model, unseen)}
            line |= _averaged(model, read[:2], unseen, start, options.steps)
            measurements.append(options.out, {**measurements.environment(), **line})
            print(line, flush=True)


def _averaged(
    model: LlamaForCausalLM, read: Sequence[Tensor], unseen: Tensor, start: str, steps: int
) -> dict[str, float]:
    """The bits of both experts, on the mean, and of their averages."""
    with tempfile.TemporaryDirectory() as name:
        bits: list[float] = []
        folders = [Path(name) / f"expert-{place}" for place in range(2)]
        for folder, text in zip(folders, read, strict=True):
            expert = LlamaForCausalLM(LlamaConfig(**SHAPE))
            own = {key: weight for key, weight in expert.state_dict().items() if ".mlp." in key}
            expert.load_state_dict(model.state_dict() | (own if start == STARTS[1] else {}))
            mlps = [weight for key, weight in expert.named_parameters() if ".mlp." in key]
            _train(expert, text, steps, mlps)
            expert.save_pretrained(folder)
            bits.append(_bits(expert, unseen))
        found = {"experts": fmean(bits)}
        given = {
            "merge_method": "task_arithmetic",
            "base_model": str(folders[0]),
            "models": [{"model": str(folders[1]), "parameters": {"weight": 0.5}}],
        }
        sources = Sources.open([ModelReference.parse(str(folder)) for folder in folders])
        for called, more in {"average": {}, "aligned": {"prepare": ["align"]}}.items():
            merged = LlamaForCausalLM(LlamaConfig(**SHAPE))
            weights = dict(Merger(sources).merge(Recipe.model_validate({**given, **more})))
            missing, unknown = merged.load_state_dict(weights, strict=False)
            assert set(missing) <= {"lm_head.weight"}, missing
            assert not unknown, unknown
            found[called] = _bits(merged, unseen)
    return found


def _bytes(pages: Sequence[bytes]) -> Tensor:
    return torch.tensor([*b"\n\n".join(pages)], dtype=torch.long)


def _train(model: LlamaForCausalLM, text: Tensor, steps: int, parameters: Sequence[torch.nn.Parameter]) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(steps):
        places = torch.randint(len(text) - CONTEXT, (BATCH,))
        batch = torch.stack([text[place : place + CONTEXT] for place in places.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()


@torch.no_grad()
def _bits(model: LlamaForCausalLM, text: Tensor) -> float:
    """Bits a byte on the first 64 windows of a text."""
    windows = text[: 64 * CONTEXT].reshape(-1, CONTEXT)
    return float(model(input_ids=windows, labels=windows).loss) / math.log(2)


def table(options: argparse.Namespace) -> None:
    """Markdown: bits a byte, the mean over seeds, by the experts' starts."""
    print("\n".join(_table(measurements.read(options.file))))


def _table(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| experts | the model they come from | each alone | average | average of aligned experts |"
    yield "|---|---:|---:|---:|---:|"
    for start in STARTS:
        own = [line for line in lines if line["start"] == start]
        if own:
            means = [fmean(line[key] for line in own) for key in ("model", "experts", "average", "aligned")]
            yield f"| {start} | {' | '.join(f'{mean:.2f}' for mean in means)} |"
    seeds = len({line["seed"] for line in lines})
    yield ""
    yield f"Bits a byte on pages that the models were not trained on, less is better; the mean of {seeds} seeds."


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("--out", type=Path, required=True)
    collecting.add_argument("--seeds", type=int, default=2)
    collecting.add_argument("--steps", type=int, default=150)
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
