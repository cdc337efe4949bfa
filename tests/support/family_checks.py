"""The decoder families in llmevo's merges and engines.

`make families` writes `benchmarks/results/families.jsonl`, a row for each family; `docs/models.md` has its table.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from torch import Tensor
from transformers import AutoConfig

from llmevo.engines.checks import check_loadable
from llmevo.engines.half_precision import use_fastest_products
from llmevo.engines.hf import HfEngine
from llmevo.errors import LlmevoError
from llmevo.merging.merger import Merger, merge
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.checkpoints import Checkpoint
from llmevo.models.conversion import class_of
from llmevo.models.sources import Sources
from support.checkpoints import quietly
from support.families import FAMILIES, NUMBER, new_family

LIMIT = 1e-5
"""How far a merged tensor may be from the same in float64, as a share of its largest entry."""

METHODS = ("linear", "ties")
WEIGHTS = (0.3, 0.9)
DENSITY = 0.4
PROMPTS = (("abc", "def"), ("one two", " three"), ("", "x y"), ("12 + 34", " = 46"))


def recipe_of(method: str, weights: Sequence[Any] = WEIGHTS, **changes: Any) -> Recipe:
    """A merge of a family's two fine-tunes."""
    models = [
        {"model": name, "parameters": {"weight": weight}} for name, weight in zip(("one", "two"), weights, strict=True)
    ]
    base = {"base_model": "base", "parameters": {"density": DENSITY}} if method == "ties" else {}
    return Recipe.model_validate({"merge_method": method, "models": models, **base, **changes})


def recipes(dtype: str) -> Mapping[str, Recipe]:
    """Merges of all weights, and one that differs from the first in one layer and one expert."""
    one = [{"filter": ".1.", "value": 2.0}, {"value": WEIGHTS[0]}]
    return {
        "linear": recipe_of("linear", dtype=dtype),
        "ties": recipe_of("ties", dtype=dtype),
        "experts": recipe_of("linear", (one, WEIGHTS[1]), dtype=dtype),
    }


def expected(method: str, base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """One merged tensor of `recipe_of(method)`, in float64."""
    base, weights = base.double(), [*zip(WEIGHTS, (model.double() for model in models), strict=True)]
    if method == "linear":
        return torch.stack([weight * model for weight, model in weights]).sum(0) / sum(WEIGHTS)
    deltas = [weight * _trimmed(model - base) for weight, model in weights]
    total = torch.stack(deltas).sum(0)
    agreeing = [torch.where(delta.sign() == total.sign(), delta, 0.0) for delta in deltas]
    divisor = sum(weight * (delta != 0) for weight, delta in zip(WEIGHTS, agreeing, strict=True))
    return base + torch.stack(agreeing).sum(0) / torch.as_tensor(divisor).clamp(min=1e-30)


def _trimmed(delta: Tensor) -> Tensor:
    """The largest entries of a task vector."""
    kept = delta.abs().flatten().topk(int(DENSITY * delta.numel())).indices
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.view(delta.shape), delta, 0.0)


def far_from_float64(root: Path, method: str) -> float:
    """The largest error of a merge, as a share of the largest entry of its tensor; inf where a tensor is missing."""
    recipe = recipe_of(method)
    made = dict(merge(recipe, Sources.open(recipe.references, root)))
    base, *models = (Checkpoint(root / name) for name in ("base", "one", "two"))
    if made.keys() != base.shapes.keys():
        return float("inf")
    far = 0.0
    for name, tensor in made.items():
        parts = [model.tensor(name) for model in (base, *models)]
        if tensor.shape[0] == NUMBER and (tensor.ndim > 2 or ".experts." in name):  # every expert by itself
            right = torch.stack([expected(method, first, others) for first, *others in zip(*parts, strict=True)])
        else:
            right = expected(method, parts[0], parts[1:])
        far = max(far, float((tensor.double() - right).abs().max() / right.abs().max().clamp(min=1e-30)))
    return far


@torch.inference_mode()
def logits_of(model: Any) -> Tensor:
    return model(torch.arange(4, 28).unsqueeze(0)).logits


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    """The model as transformers loads it from the folder, with the products of the engine.

    Fails where transformers leaves weights out or makes some up.
    """
    kind = class_of(AutoConfig.from_pretrained(folder))
    model, said = quietly(lambda: kind.from_pretrained(folder, dtype=dtype, output_loading_info=True))
    wrong = {key: sorted(map(str, of)) for key, of in said.items() if of and key != "error_msgs"}
    assert not wrong, f"{folder.name}: {wrong}"
    use_fastest_products(model)
    return model.eval()


def check_swaps(root: Path, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Fail unless swaps in the transformers engine give the models that their exports are, back and forth."""
    name = str(dtype).removeprefix("torch.")
    sources = Sources(root)
    check_loadable(root / "base", sources[recipe_of("linear").donor].shapes)
    engine = quietly(lambda: HfEngine(root / "base", root / "base", name, "cpu", Merger(sources, 0)))
    found: dict[str, Tensor] = {}
    for at in ("linear", "ties", "experts", "linear"):
        recipe = recipes(name)[at]
        engine.swap(recipe)
        made = logits_of(engine.model)
        assert torch.equal(made, found.setdefault(at, made)), f"{at}: other logits after a swap to and fro"
        if not (folder := out / at).exists():
            write_model(recipe, sources, folder, trim=False)
            model = loaded(folder, dtype)
            assert torch.equal(logits_of(model), made), f"{at}: other logits than the exported model's"
            assert not (wrong := engine.differences(folder)), f"{at}: differences in {wrong[:3]}"
            asked = [Instance("loglikelihood", {}, prompt, 0) for prompt in PROMPTS]
            for (_, rest), (score, _), right in zip(
                PROMPTS, engine.lm.loglikelihood(asked), _likelihoods(model, engine.lm), strict=True
            ):
                allowed = (0.001 if dtype == torch.float32 else 0.2) * len(rest)
                assert abs(score - right) <= allowed, f"{at}: {score} by the scorer, {right} by the model's logits"
    assert not any(torch.equal(found["linear"], other) for at, other in found.items() if at != "linear"), "unchanged"
    assert engine.differences(out / "ties"), "no differences of different models"


@torch.inference_mode()
def _likelihoods(model: Any, lm: Any) -> Iterator[float]:
    """The log-likelihoods of PROMPTS by the model's own logits."""
    for context, rest in PROMPTS:
        before = lm.tok_encode(context) if context else [lm.prefix_token_id]
        after = lm.tok_encode(context + rest)[len(before) if context else 0 :]
        logprobs = model(torch.tensor([[*before, *after]])).logits[0].float().log_softmax(-1)
        yield sum(float(logprobs[len(before) + i - 1, token]) for i, token in enumerate(after))


def check_vllm(root: Path, out: Path, dtype: str) -> float:
    """Fail unless swaps in vLLM give the likelihoods that vLLM gives the exported models, bit for bit, back and forth.

    Return the largest difference from transformers' likelihoods of these models, in nats a token: the two compute
    differently in some families.
    """
    from llmevo.engines.vllm import PROBES, VllmEngine

    asked = [Instance("loglikelihood", {}, probe, 0) for probe in PROBES]

    def likelihoods(lm: Any) -> list[float]:
        return [score for score, _ in lm.loglikelihood(asked)]

    found: dict[str, list[float]] = {}
    far = 0.0
    engine = VllmEngine(root / "base", root / "base", dtype, root)
    try:
        for at in ("linear", "experts", "linear"):
            recipe = recipes(dtype)[at]
            engine.swap(recipe)
            own = likelihoods(engine.lm)
            assert own == found.setdefault(at, own), f"{at}: other likelihoods after a swap to and fro"
            if not (out / at).exists():
                write_model(recipe, Sources(root), out / at, trim=False)
                reference = quietly(lambda at=at: engine.reference(out / at))
                pairs = zip(PROBES, own, likelihoods(reference.lm), strict=True)
                far = max(far, *(abs(one - other) / len(rest) for (_, rest), one, other in pairs))
    finally:
        engine.close()
    assert found["linear"] != found["experts"]
    for at, swapped in found.items():
        fresh = VllmEngine(out / at, out / at, dtype)
        own = likelihoods(fresh.lm)
        fresh.close()
        assert own == swapped, f"{at}: {swapped} after a swap, {own} of the exported model"
    return far


def rows(families: Sequence[str], with_vllm: bool) -> Iterator[dict[str, Any]]:
    """What holds for each family: "yes", or the reason why not."""
    for name in families:
        row: dict[str, Any] = {"family": name, "kind": FAMILIES[name].kind, "model_type": FAMILIES[name].model_type}
        with tempfile.TemporaryDirectory() as temporary:
            root = new_family(Path(temporary), name)
            try:
                row["merge"] = max(far_from_float64(root, method) for method in METHODS)
            except LlmevoError as error:
                row["merge"] = str(error)
            row["hf, bfloat16"] = _outcome(root, lambda root=root: check_swaps(root, root / "half", torch.bfloat16))
            row["hf"] = _outcome(root, lambda root=root: check_swaps(root, root / "full", torch.float32))
            if with_vllm:
                for column, dtype in (("vllm", "bfloat16"), ("vllm, float32", "float32")):
                    place = root / column, dtype
                    row[column] = _outcome(root, lambda root=root, place=place: check_vllm(root, *place))
                    if isinstance(row[column], float):  # some of vLLM's kernels for CPUs take one type only
                        break
        yield row


def _outcome(root: Path, check: Callable[[], float | None]) -> float | str:
    """The number that a check returns, "yes" without one, or why it fails."""
    try:
        found = check()
    except Exception as error:  # vLLM's kernels raise any
        return " ".join((str(error) or repr(error)).replace(f"{root}/", "").split())[:300]
    return "yes" if found is None else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file to write, as lines of JSON")
    parser.add_argument("--family", action="append", help="only this one; may be given several times")
    parser.add_argument("--vllm", action="store_true", help="also in vLLM, which takes an hour")
    given = parser.parse_args()
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    measurements = importlib.import_module("measurements")
    torch.set_num_threads(1)
    if given.out:
        given.out.write_text("")
    here = measurements.environment()
    for row in rows(given.family or [*FAMILIES], given.vllm):
        print(row, flush=True)
        measurements.append(given.out, {"benchmark": "families", **row, **here})


if __name__ == "__main__":
    main()
