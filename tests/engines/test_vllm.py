"""The vLLM engine with a real vLLM: swaps leave exactly the new model, and requests are answered as transformers does.

One engine a kind of model serves most tests; "fresh" engines are started on exported folders.
"""

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llmevo.engines import vllm_worker
from llmevo.engines.scoring import vllm as vllm_scoring
from llmevo.engines.scoring.hf import HfScorer
from llmevo.engines.scoring.vllm import VllmScorer
from llmevo.engines.vllm import VllmEngine
from llmevo.engines.vllm_worker import part_of
from llmevo.errors import CandidateError, ConfigError, SourceError, TaskError
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.tasks.task import AskingOptions, Task
from llmevo.merging.merger import Merger, merge
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.testing import EngineContract
from llmevo.testing.engines import requests
from support.tiny_model import POSITIONS, text, tiny_llama, tiny_tokenizer
from support.workspace import write_task

DTYPE = "bfloat16"
KINDS = ("tied", "untied")
"""Llama with the embeddings as its output head, and Qwen2 with a head of its own and with biases."""

CONTEXTS = ("abc", "the quick brown fox jumps over it", "0 1 2 0 1 2 0 1 ", "x")
PAIRS = [(context, choice) for context in CONTEXTS for choice in ("a", " b", " yes", "12", "?", " a longer one")]


def save_model(folder: Path, kind: str, seed: int, shape: Mapping[str, Any]) -> None:
    """A tiny model whose biases and norms are random as well, in `DTYPE`, with its tokenizer."""
    model: Any = tiny_llama(seed, tied=True, **shape) if kind == "tied" else _qwen2(seed, shape)
    random_bits = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(torch.randn(weight.shape, generator=random_bits) * 0.3)
    model.to(getattr(torch, DTYPE)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _qwen2(seed: int, shape: Mapping[str, Any]) -> Any:
    like: Any = tiny_llama(seed, **shape).config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(Qwen2Config(**{key: getattr(like, key) for key in QWEN2})).eval()


QWEN2 = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "initializer_range": 0.15,
    "max_position_embeddings": 256,
}

SEED = 7


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of each kind, one whose embeddings are another's rolled by a row, and one that is not finite."""
    root = tmp_path_factory.mktemp("vllm")
    for kind in KINDS:
        for seed, name in enumerate(("base", "other")):
            save_model(root / kind / name, kind, seed, SHAPE)
        altered(root / kind / "base", root / kind / "rolled", "model.embed_tokens.weight", lambda w: w.roll(1, 0))
        last = "model.layers.2.mlp.down_proj.weight"
        altered(root / kind / "base", root / kind / "broken", last, lambda w: w * math.nan)
    return root


def altered(source: Path, folder: Path, name: str, change: Any) -> None:
    """A copy of a model with one weight changed."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    weights[name] = change(weights[name]).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def linear(root: Path, *weights: float, names: tuple[str, ...] = ("base", "other"), **more: Any) -> Recipe:
    models = [{"model": str(root / name), "parameters": {"weight": w}} for name, w in zip(names, weights, strict=True)]
    return Recipe.model_validate({"merge_method": "linear", "models": models, "dtype": DTYPE, **more})


def layered(root: Path, weights: list[float]) -> Recipe:
    """Each of the three layers has a weight of its own for the second model."""
    slices = [
        {
            "sources": [
                {"model": str(root / "base"), "layer_range": [i, i + 1], "parameters": {"weight": 1 - weight}},
                {"model": str(root / "other"), "layer_range": [i, i + 1], "parameters": {"weight": weight}},
            ]
        }
        for i, weight in enumerate(weights)
    ]
    return Recipe.model_validate({"merge_method": "linear", "slices": slices, "dtype": DTYPE})


def start(folder: Path, dtype: str = DTYPE) -> VllmEngine:
    return VllmEngine(folder, folder, dtype, seed=SEED, options={"kv_cache_memory_bytes": 1 << 26})


@dataclass
class Served:
    """A running engine, started on the model `base` in a folder of models of one kind."""

    kind: str
    root: Path
    engine: VllmEngine
    exported: Path
    """The merge `mixed` as the exporter writes it."""
    fresh: Any
    """The answers of an engine started on it."""

    def swapped(self, recipe: Recipe) -> Any:
        """The answers after a swap."""
        self.engine.swap(recipe)
        return answers(self.engine.lm)

    @property
    def plain(self) -> Recipe:
        return linear(self.root, 0.9, 0.1)

    @property
    def mixed(self) -> Recipe:
        """Changes every weight, and the embeddings beyond recognition."""
        return linear(self.root, 0.7, 0.3, names=("rolled", "other"))


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, models: Path) -> Iterator[Served]:
    root = models / request.param
    exported = root / "exported"
    write_model(linear(root, 0.7, 0.3, names=("rolled", "other")), Sources(), exported, SEED)
    engine = start(exported)
    fresh = answers(engine.lm)
    engine.close()
    engine = start(root / "base")
    yield Served(request.param, root, engine, exported, fresh)
    engine.close()


def answers(lm: Any) -> tuple[list[str], list[tuple[float, bool]]]:
    """What a model generates, and how likely it finds some texts."""
    options = {"until": [], "max_gen_toks": 12}
    texts = lm.generate_until(requests("generate_until", [(context, options) for context in CONTEXTS]))
    return texts, lm.loglikelihood(requests("loglikelihood", PAIRS))


def assert_same(found: Any, expected: Any) -> None:
    """The same texts, greedy flags and, but for the noise of the type, log-likelihoods."""
    assert found[0] == expected[0]
    assert [greedy for _, greedy in found[1]] == [greedy for _, greedy in expected[1]]
    assert [score for score, _ in found[1]] == pytest.approx([score for score, _ in expected[1]], rel=1e-2, abs=0.05)


def digest_of(folder: Path, names: list[str]) -> str:
    digest = hashlib.blake2b()
    weights = load_file(folder / "model.safetensors")
    for name in names:
        digest.update(name.encode() + weights[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Swaps


@pytest.mark.vllm
class TestVllmEngine(EngineContract):
    dtype = DTYPE

    @pytest.fixture
    def model_folders(self, served: Served) -> tuple[Path, Path]:
        return served.root / "rolled", served.root / "other"

    @pytest.fixture
    def engine(self, served: Served) -> VllmEngine:
        return served.engine


@pytest.mark.vllm
def test_swaps_back_and_forth_leave_exactly_the_new_model(served: Served) -> None:
    first = served.swapped(served.plain)
    mixed = served.swapped(served.mixed)
    assert_same(mixed, served.fresh)
    assert mixed[0] != first[0]
    assert served.swapped(served.plain) == first


@pytest.mark.vllm
def test_what_is_merged_in_the_worker_is_what_the_exporter_writes(served: Served) -> None:
    served.engine.swap(served.plain)
    outcome = served.engine.swap(served.mixed, with_digest=True)
    names = [name for name, _ in merge(served.mixed, Sources(), SEED)]
    assert outcome["tensors"] == len(names)
    assert outcome["digest"] == digest_of(served.exported, names)


@pytest.mark.vllm
def test_prepared_experts_are_read_by_the_worker_and_not_made_again(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(tmp_path / "cache"))
    models = [{"model": str(served.root / "other"), "parameters": {"weight": 0.8}}]
    given = {"merge_method": "task_arithmetic", "base_model": str(served.root / "base"), "models": models}
    recipe = Recipe.model_validate({**given, "prepare": [{"star": {"eta": 0.5}}], "dtype": DTYPE})
    write_model(recipe, Sources(), tmp_path / "out", SEED)
    (made,) = (tmp_path / "cache" / "prepared").iterdir()
    before = (made / "model.safetensors").stat()
    served.engine.swap(served.plain)
    outcome = served.engine.swap(recipe, with_digest=True)
    names = [name for name, _ in merge(recipe, Sources(), SEED)]
    assert outcome["digest"] == digest_of(tmp_path / "out", names)
    assert outcome["digest"] != digest_of(served.exported, names)
    assert [*(tmp_path / "cache" / "prepared").iterdir()] == [made]
    after = (made / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.vllm
def test_new_embeddings_reach_the_output_head(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM alone leaves a tied head as it was on a CPU where it packs weights: the test would see that again."""
    rolled = linear(served.root, 1.0, names=("rolled",))
    served.engine.swap(linear(served.root, 1.0, names=("base",)))
    found = served.swapped(rolled)[1]
    model: Any = AutoModelForCausalLM.from_pretrained(served.root / "rolled", dtype=torch.float32)
    expected = answers(HfScorer(model, served.engine.lm.tokenizer))[1]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=0.02, abs=0.3)
    if served.kind == "tied" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        served.engine.swap(linear(served.root, 1.0, names=("base",)))
        monkeypatch.setattr(vllm_worker, "_pack_tied_heads", lambda _: None)
        assert served.swapped(rolled)[1] != found


@pytest.mark.vllm
def test_only_parts_that_change_are_merged_again(served: Served) -> None:
    served.engine.swap(layered(served.root, [0.1, 0.2, 0.3]))
    assert served.engine.swap(layered(served.root, [0.1, 0.2, 0.3]))["tensors"] == 0
    outcome = served.engine.swap(layered(served.root, [0.1, 0.4, 0.3]))
    found = answers(served.engine.lm)
    names = Sources()[ModelReference.parse(str(served.root / "base"))].shapes
    assert outcome["tensors"] == len([name for name in names if ".layers.1." in name])
    served.engine.swap(served.mixed)
    assert served.swapped(layered(served.root, [0.1, 0.4, 0.3])) == found


@pytest.mark.vllm
def test_a_change_of_one_of_several_fused_weights_loads_the_others_too(served: Served) -> None:
    def recipe(queries: float) -> Recipe:
        weights = {"base": [{"filter": "q_proj", "value": queries}, {"value": 0.8}], "other": 0.2}
        models = [
            {"model": str(served.root / name), "parameters": {"weight": weight}} for name, weight in weights.items()
        ]
        return Recipe.model_validate({"merge_method": "linear", "models": models, "dtype": DTYPE})

    served.engine.swap(recipe(0.3))
    outcome = served.engine.swap(recipe(0.5))
    found = answers(served.engine.lm)
    assert 3 * 4 <= outcome["tensors"] < 3 * 8
    served.engine.swap(served.mixed)
    assert served.swapped(recipe(0.5)) == found


@pytest.mark.vllm
def test_a_load_leaves_nothing_in_the_prefix_cache(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    long = requests("loglikelihood", [("the same long context " * 6, choice) for choice in ("a", "b")])
    served.engine.swap(served.plain)
    served.engine.lm.loglikelihood(long)
    served.engine.swap(served.mixed)
    found = served.engine.lm.loglikelihood(long)
    served.engine.swap(served.plain)
    served.engine.lm.loglikelihood(long)
    monkeypatch.setattr(served.engine._llm, "reset_prefix_cache", lambda: True)  # pyright: ignore[reportPrivateUsage]
    served.engine.swap(served.mixed)
    assert served.engine.lm.loglikelihood(long) != found
    monkeypatch.undo()
    served.engine.swap(served.mixed)
    assert served.engine.lm.loglikelihood(long) == found


# Failures


def failing(how: str) -> Any:
    """A `Merger.merge` in whose middle something goes wrong."""
    whole: Any = Merger.merge

    def merge(self: Any, recipe: Recipe, loaded: Any = None, quantize: str = "") -> Iterator[tuple[str, Tensor]]:
        for place, (name, weight) in enumerate(whole(self, recipe, loaded, quantize)):
            if place == 10 and how == "raise":
                raise RuntimeError("out of luck")
            if place == 10 and how == "name":
                yield "model.layers.0.unknown.weight", weight
            elif place == 10 and how == "shape":
                yield name, weight[:1]
            elif place == 10 and how == "missing":
                return
            else:
                yield name, weight

    return merge


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "RuntimeError: out of luck"),
        ("name", "unknown.weight is .* no such weight in the running model"),
        ("shape", "in the running model"),
        ("missing", "made no weight for"),
    ],
)
def test_after_a_merge_that_fails_halfway_the_next_swap_is_right(
    how: str, reason: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = served.swapped(served.plain)
    monkeypatch.setattr(Merger, "merge", failing(how))
    with pytest.raises(CandidateError, match=reason):
        served.engine.swap(served.mixed)
    monkeypatch.undo()
    assert served.swapped(served.plain) == first
    assert_same(served.swapped(served.mixed), served.fresh)


@pytest.mark.vllm
def test_after_a_load_that_fails_inside_vllm_the_next_swap_is_right(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(self: Any, recipe: Recipe, *_: Any) -> Iterator[tuple[str, Tensor]]:
        for place, pair in enumerate(self.merger.merge(recipe)):
            yield ("no.such.weight", pair[1]) if place == 10 else pair

    first = served.swapped(served.plain)
    monkeypatch.setattr(vllm_worker.Merging, "_weights", weights)
    with pytest.raises(CandidateError, match="no"):
        served.engine.swap(served.mixed)
    monkeypatch.undo()
    assert served.swapped(served.plain) == first


@pytest.mark.vllm
def test_a_candidate_that_is_not_finite_fails_and_costs_nothing_else(
    served: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    first = served.swapped(served.plain)
    with pytest.raises(CandidateError, match="not finite"):
        served.engine.swap(linear(served.root, 0.5, 0.5, names=("broken", "other")))
    with pytest.raises(SourceError, match="nowhere"):
        served.engine.swap(linear(served.root, 0.5, 0.5, names=("nowhere", "other")))
    assert served.swapped(served.plain) == first
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_a_missing_vllm_is_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[vllm\]'.*make vllm"):
        VllmEngine(tmp_path, tmp_path, DTYPE)


def scripted(logprob: float, max_length: int = 64) -> VllmScorer:
    """A scorer over a vLLM that gives every token this log-probability and writes `a`."""

    def generate(inputs: Any, *_: Any, **__: Any) -> list[Any]:
        token = SimpleNamespace(logprob=logprob, rank=1)
        output = SimpleNamespace(logprobs=[dict.fromkeys(range(200), token)], token_ids=[70])
        return [SimpleNamespace(outputs=[output]) for _ in inputs]

    cache = SimpleNamespace(cache_config=SimpleNamespace(block_size=16))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=cache), generate=generate)
    return VllmScorer(llm, lambda **_: None, tiny_tokenizer(), max_length, 0)


def test_a_model_whose_outputs_are_not_numbers_has_no_scores_and_no_texts() -> None:
    asked = requests("loglikelihood", [("abc", "d")]), requests("generate_until", [("abc", {"max_gen_toks": 5})])
    lm = scripted(-1.0)
    assert lm.loglikelihood(asked[0]) == [(-1.0, False)]
    assert lm.generate_until(asked[1]) == [tiny_tokenizer().decode([70])]
    lm = scripted(math.nan)
    for ask, some in zip((lm.loglikelihood, lm.generate_until), asked, strict=True):
        with pytest.raises(CandidateError, match="not numbers"):
            ask(some)


def test_a_reply_as_long_as_the_context_leaves_no_question() -> None:
    with pytest.raises(TaskError, match="max_gen_toks: 64 leaves no token of the 64"):
        scripted(-1.0).generate_until(requests("generate_until", [("abc", {"max_gen_toks": 64})]))


@pytest.mark.vllm
def test_wrong_options_are_told(models: Path) -> None:
    base = models / "tied" / "base"
    with pytest.raises(ConfigError, match="worker_extension_cls is set by llmevo"):
        VllmEngine(base, base, DTYPE, options={"worker_extension_cls": "mine"})
    with pytest.raises(ConfigError, match=r"does not start.*no_such_option.*engine\.options"):
        VllmEngine(base, base, DTYPE, options={"no_such_option": 1})


def test_parts_hold_everything_that_may_be_fused() -> None:
    assert part_of("model.layers.3.self_attn.q_proj.weight") == part_of("model.layers.3.self_attn.k_proj.bias")
    assert part_of("model.layers.3.mlp.experts.0.w1.weight") == part_of("model.layers.3.mlp.experts.7.w2.weight")
    assert part_of("model.layers.3.mlp.up_proj.weight") != part_of("model.layers.13.mlp.up_proj.weight")
    assert part_of("lm_head.weight") == part_of("lm_head.bias") != part_of("model.norm.weight")
    assert part_of("visual.merger.mlp.0.weight") == part_of("visual.merger.mlp.0.bias")


# Answers


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """(vLLM's, transformers') scorer of one model in float32, which holds few tokens."""
    folder = tmp_path_factory.mktemp("exact")
    shape: Any = {**SHAPE, "max_position_embeddings": POSITIONS}
    model = tiny_llama(3, **shape)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    engine = start(folder, "float32")
    yield engine.lm, HfScorer(model, tiny_tokenizer())
    engine.close()


@pytest.mark.vllm
def test_log_likelihoods_are_those_of_transformers(exact: tuple[Any, Any]) -> None:
    lm, expected = exact
    pairs = [
        *PAIRS,
        ("", "alone"),
        ("one context ", "same"),
        ("one context ", "same"),
        *((text(3, POSITIONS - 2), choice) for choice in ("a", " b", " nowhere")),  # some fit exactly, some do not
        *((text(4, 3 * POSITIONS), choice) for choice in ("a", " b", " nowhere")),
        (text(5, 10), text(6, POSITIONS - 1)),  # long continuations, and of the longest
        (text(5, 10), text(6, POSITIONS)),
        *((text(7, 4), token) for token in ("\n", *map(chr, range(33, 127)))),
    ]
    asked = requests("loglikelihood", pairs)
    found, right = lm.loglikelihood(asked), expected.loglikelihood(asked)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in right], abs=1e-2)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in right]
    assert any(greedy for _, greedy in found)


@pytest.mark.vllm
def test_rolling_log_likelihoods_are_those_of_transformers(exact: tuple[Any, Any]) -> None:
    lm, expected = exact
    texts = ["a", "short text", text(7, POSITIONS), text(8, POSITIONS + 1), text(9, 3 * POSITIONS + 5)]
    asked = requests("loglikelihood_rolling", [(text,) for text in texts])
    assert lm.loglikelihood_rolling(asked) == pytest.approx(expected.loglikelihood_rolling(asked), abs=1e-2)


@pytest.mark.vllm
def test_many_followers_of_one_context_are_asked_for_in_several_requests(
    exact: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests("loglikelihood", [("abc", chr(code)) for code in range(40, 60)])
    expected = exact[0].loglikelihood(asked)
    monkeypatch.setattr(vllm_scoring, "MAX_LOGPROBS", 3)
    assert exact[0].loglikelihood(asked) == expected


@pytest.mark.vllm
def test_texts_are_those_of_transformers(exact: tuple[Any, Any]) -> None:
    lm, expected = exact
    contexts = [text(seed, length) for seed, length in enumerate((3, 30, 7, 7, 3 * POSITIONS, 1))]
    free: dict[str, Any] = {"until": [], "max_gen_toks": 12}

    def generate(options: dict[str, Any]) -> list[str]:
        asked = requests("generate_until", [(context, options) for context in contexts])
        found = lm.generate_until(asked)
        assert found == expected.generate_until(asked)
        return found

    long = generate(free)
    assert any(long)
    assert generate({**free, "until": [long[0][5], long[1][3:5], "nowhere to be found"]}) != long
    generate({**free, "until": long[2][2:4], "max_gen_toks": 5, "temperature": 0.0})
    assert generate({**free, "repetition_penalty": 1.5}) != long
    assert generate({"until": [], "max_tokens": 12, "temperature": 0.7, "do_sample": False, "num_beams": 1}) == long
    sampled = requests("generate_until", [(contexts[0], {**free, "temperature": 2.0, "do_sample": True})] * 2)
    found = lm.generate_until(sampled)
    assert lm.generate_until(sampled) == found
    assert len({*found, long[0]}) == 3
    with pytest.raises(TaskError, match=r"vLLM cannot use num_beams .*engine: {backend: hf}"):
        lm.generate_until(requests("generate_until", [("abc", {**free, "num_beams": 2})]))


@pytest.mark.vllm
def test_chat_templates_and_tasks_are_scored_as_with_transformers(exact: tuple[Any, Any], tmp_path: Path) -> None:
    write_task(tmp_path, "letters", 0)
    for chat in (False, True):
        protocol = AskingOptions(apply_chat_template=chat, num_fewshot=0)
        evaluator = Evaluator([Task(name="letters")], protocol, [tmp_path / "tasks"])
        found, expected = (evaluator.score(lm) for lm in exact)
        assert found == expected
        assert 0 < found.total < 1


@pytest.mark.vllm
def test_no_request_gets_no_answer(exact: tuple[Any, Any]) -> None:
    assert exact[0].loglikelihood([]) == exact[0].generate_until([]) == []


# Processes

SCRIPT = """
from pathlib import Path
from llmevo.engines.vllm import VllmEngine
from llmevo.errors import CandidateError
from llmevo.merging.recipe import Recipe

root = Path({root!r})
base = root / "base"
recipe = Recipe.from_yaml({recipe!r})
broken = Recipe.from_yaml({broken!r})
engine = VllmEngine(base, base, "bfloat16", seed=7, options={{"kv_cache_memory_bytes": 1 << 26}})
try:
    engine.swap(broken)
except CandidateError as error:
    print("not finite" in str(error))
print(engine.swap(recipe, with_digest=True)["digest"])
engine.close()
"""


@pytest.mark.vllm
def test_workers_in_processes_of_their_own_merge_the_same(models: Path, tmp_path: Path) -> None:
    """As on GPUs, from a script that does not guard its main part and must not be run again by the workers."""
    root = models / "tied"
    recipe = linear(root, 0.7, 0.3, names=("rolled", "other"))
    broken = linear(root, 0.7, 0.3, names=("broken", "other"))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(root), recipe=recipe.to_yaml(), broken=broken.to_yaml()))
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    digest = hashlib.blake2b()
    for name, weight in merge(recipe, Sources(), 7):
        digest.update(name.encode() + weight.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    assert (done.returncode, done.stdout.splitlines()) == (0, ["True", digest.hexdigest()]), done.stderr
    assert not any(word in done.stderr for word in ("Failed to load", "Traceback", "WARNING"))
