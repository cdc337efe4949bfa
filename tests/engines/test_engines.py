"""The transformers engine: lm-eval's requests answered as lm-eval's own engine does, and weights swapped in place."""

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from lm_eval.models.huggingface import HFLM
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmevo.engines.half_precision import fastest_products
from llmevo.engines.hf import HfEngine
from llmevo.engines.scoring.base import check_numbers
from llmevo.engines.scoring.hf import HfScorer, StopStrings
from llmevo.errors import CandidateError, SourceError, TaskError
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.checkpoints import Checkpoint, read_object
from llmevo.models.quantize import FORMATS, quantizer
from llmevo.models.sources import Sources
from llmevo.testing import EngineContract
from llmevo.testing.engines import requests
from support.tiny_model import POSITIONS, save_tiny, text, tiny_llama, tiny_tokenizer

VOCABULARY = len(tiny_tokenizer())


def reference(model: Any, tokenizer: Any) -> Any:
    """lm-eval's own engine over the same model."""
    engine: Any = HFLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return engine(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4, device="cpu")


CHOICES = ["a", " b", " yes", " nowhere", "12", " a longer one\n"]
PAIRS = [
    *((text(1, 20), choice) for choice in CHOICES),
    *((text(2, 9), choice) for choice in CHOICES),
    ("", "alone"),
    ("", "b"),
    ("one context ", "same"),
    ("one context ", "same"),
    ("ends in spaces  ", "word"),
    *((text(3, POSITIONS - 2), choice) for choice in CHOICES),  # some fit exactly, some do not
    *((text(4, 3 * POSITIONS), choice) for choice in CHOICES),
    (text(5, 10), text(6, POSITIONS - 1)),
    (text(5, 10), text(6, POSITIONS)),
]
"""(context, continuation): shared contexts, none, equal requests, too long ones."""


def models() -> dict[str, Any]:
    ids: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt2 = GPT2Config(vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4, **ids)
        bloom = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4, **ids)
        mpt = MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, initializer_range=0.4, **ids)
        mamba = MambaConfig(
            vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.4, **ids
        )
        return {
            "llama": tiny_llama(),
            "llama tied": tiny_llama(tied=True),
            "llama, sliding window": MistralForCausalLM(MistralConfig(**_small(), sliding_window=32)).eval(),
            "qwen3": Qwen3ForCausalLM(Qwen3Config(**_small(), head_dim=8)).eval(),
            "gemma2": Gemma2ForCausalLM(
                Gemma2Config(
                    **_small(),
                    head_dim=8,
                    sliding_window=32,
                    query_pre_attn_scalar=8,
                    attn_logit_softcapping=5.0,
                    final_logit_softcapping=4.0,
                )
            ).eval(),
            "gpt2": GPT2LMHeadModel(gpt2).eval(),
            "mpt": MptForCausalLM(mpt).eval(),
            "bloom": BloomForCausalLM(bloom).eval(),
            "mamba": MambaForCausalLM(mamba).eval(),
        }


def _small() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.4,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }


@pytest.fixture(scope="module")
def zoo() -> Iterator[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield models()


def tokenizer_for(name: str) -> Any:
    """MPT, Bloom and Mamba name no longest text in their config; lm-eval then asks the tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 2048 if name in ("mpt", "bloom", "mamba") else tokenizer.model_max_length
    return tokenizer


TREES = ("llama", "llama tied", "llama, sliding window", "qwen3", "gemma2", "gpt2")
ZOO = (*TREES, "mpt", "bloom", "mamba")
each_model = pytest.mark.parametrize("name", ZOO)


def assert_same(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


class TestHfEngine(EngineContract):
    @pytest.fixture(params=[False, True], ids=["head of its own", "tied head"])
    def model_folders(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
        return save_tiny(tmp_path / "one", 1, request.param), save_tiny(tmp_path / "two", 2, request.param)

    @pytest.fixture
    def engine(self, model_folders: tuple[Path, Path]) -> HfEngine:
        return HfEngine(model_folders[0], model_folders[0], self.dtype, "cpu", Merger(Sources()))


# The same answers as lm-eval's own engine


@each_model
def test_log_likelihoods_are_those_of_lm_evals_own_engine(name: str, zoo: dict[str, Any]) -> None:
    model, tokenizer = zoo[name], tokenizer_for(name)
    asked = requests("loglikelihood", PAIRS)
    expected = reference(model, tokenizer).loglikelihood(asked, disable_tqdm=True)
    assert_same(HfScorer(model, tokenizer).loglikelihood(asked), expected)


@each_model
def test_rolling_log_likelihoods_are_those_of_lm_evals_own_engine(name: str, zoo: dict[str, Any]) -> None:
    model, tokenizer = zoo[name], tokenizer_for(name)
    texts = ["a", "short text", text(7, POSITIONS), text(8, POSITIONS + 1), text(9, 3 * POSITIONS + 5)]
    asked = requests("loglikelihood_rolling", [(text,) for text in texts])
    expected = reference(model, tokenizer).loglikelihood_rolling(asked, disable_tqdm=True)
    assert HfScorer(model, tokenizer).loglikelihood_rolling(asked) == pytest.approx(expected, abs=1e-2)


@each_model
def test_generated_texts_are_those_of_lm_evals_own_engine(name: str, zoo: dict[str, Any]) -> None:
    model, tokenizer = zoo[name], tokenizer_for(name)
    free: dict[str, Any] = {"until": [], "max_gen_toks": 12, "do_sample": False}
    contexts = [text(seed, length) for seed, length in enumerate((3, 30, 7, 7, 3 * POSITIONS, 1))]
    own, lm = reference(model, tokenizer), HfScorer(model, tokenizer)

    def generate(options: dict[str, Any]) -> list[str]:
        asked = requests("generate_until", [(context, options) for context in contexts])
        expected = own.generate_until(asked, disable_tqdm=True)
        assert lm.generate_until(asked) == expected
        return expected

    long = generate(free)
    assert any(long)
    stops = [long[0][5], long[1][3:5], "nowhere to be found"]
    assert generate({**free, "until": stops}) != long
    generate({**free, "until": long[2][2:4], "max_gen_toks": 5, "temperature": 0.0})


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12},
        {"max_gen_toks": None, "max_tokens": 5},
        {"temperature": 0.7, "do_sample": False},
    ],
    ids=str,
)
def test_a_tasks_options_of_generation_have_the_effect_that_they_have_in_lm_eval(
    options: dict[str, Any], zoo: dict[str, Any]
) -> None:
    own, lm = reference(zoo["llama"], tiny_tokenizer()), HfScorer(zoo["llama"], tiny_tokenizer())
    given: dict[str, Any] = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, **options}
    asked = requests("generate_until", [(text(seed, 7), given) for seed in range(4)])
    assert lm.generate_until(asked) == [own.generate_until([one], disable_tqdm=True)[0] for one in asked]


def test_sampled_texts_follow_from_the_seed_and_not_from_what_was_sampled_before(zoo: dict[str, Any]) -> None:
    given: dict[str, Any] = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    asked = requests("generate_until", [*[(text(1, 7), given)] * 3, (text(2, 9), given)])
    lm = HfScorer(zoo["llama"], tiny_tokenizer(), seed=1)
    state = torch.random.get_rng_state()
    first = lm.generate_until(asked)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert lm.generate_until(asked) == first
    assert len({*first}) == 4  # three samples of one text
    assert HfScorer(zoo["llama"], tiny_tokenizer(), seed=2).generate_until(asked) != first


def test_requests_of_different_kinds_come_back_in_their_order(zoo: dict[str, Any]) -> None:
    lm = HfScorer(zoo["llama"], tiny_tokenizer())
    short: dict[str, Any] = {"until": [], "max_gen_toks": 2, "do_sample": False}
    longer = {**short, "max_gen_toks": 6}
    asked = [("abc", short), ("abc", longer), ("0", short), ("0", longer)]
    texts = lm.generate_until(requests("generate_until", asked))
    assert [len(found) for found in texts] == [2, 6, 2, 6]
    assert texts[1].startswith(texts[0])
    assert texts[3].startswith(texts[2])


def test_a_tokenizer_that_begins_texts_gives_lm_evals_own_answers_too(zoo: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer(begin=True)
    pairs = [*PAIRS[:14], ("<s>given already", " b"), ("<s>given already", "c")]
    own, lm = reference(zoo["llama"], tokenizer), HfScorer(zoo["llama"], tokenizer)
    asked = requests("loglikelihood", pairs)
    assert_same(lm.loglikelihood(asked), own.loglikelihood(asked, disable_tqdm=True))
    options: dict[str, Any] = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    for context in ("abc", "<s>abc"):  # one at a time: lm-eval's engine judges a batch by its first text
        generating = requests("generate_until", [(context, options)])
        assert lm.generate_until(generating) == own.generate_until(generating, disable_tqdm=True)


def test_chat_templates_are_applied_as_by_lm_evals_own_engine(zoo: dict[str, Any]) -> None:
    chat = [{"role": "user", "content": "2 + 2?"}]
    own, lm = reference(zoo["llama"], tiny_tokenizer()), HfScorer(zoo["llama"], tiny_tokenizer())
    assert lm.apply_chat_template(chat) == own.apply_chat_template(chat) == "<user>2 + 2?\n<assistant>"
    begun = [*chat, {"role": "assistant", "content": "It is"}]
    assert lm.apply_chat_template(begun, False) == own.apply_chat_template(begun, False)


GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""What Gemma's chat template refuses."""


def test_a_system_message_that_the_chat_template_refuses_begins_the_first_user_message(zoo: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = GEMMA
    own, lm = reference(zoo["llama"], tokenizer), HfScorer(zoo["llama"], tokenizer)
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    chat = [{"role": "system", "content": "Add.\n"}, *turns, {"role": "user", "content": "1 + 1?"}]
    assert lm.apply_chat_template(chat) == "<user>Add.\n\n2 + 2?\n<assistant>4\n<user>1 + 1?\n<assistant>"
    plain = [{"role": "user", "content": "Add.\n\n2 + 2?"}, *chat[2:]]
    assert lm.apply_chat_template(chat) == own.apply_chat_template(plain)
    assert lm.apply_chat_template(chat[:-1], False) == own.apply_chat_template(plain[:-1], False)
    with pytest.raises(TemplateError, match="must alternate"):  # a chat that is wrong itself is told
        lm.apply_chat_template([turns[0], turns[0]])


def test_a_model_of_images_and_text_holds_as_much_as_its_text_config_says() -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config={**_small(), "head_dim": 8, "sliding_window": 32},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    lm = HfScorer(Gemma3ForConditionalGeneration(config).eval(), tiny_tokenizer())
    assert lm.max_length == POSITIONS


class Renamed(LlamaModel):
    """The body of a newer transformers, which calls the keys and values that it is given `cache`."""

    def forward(self, input_ids: Any = None, cache: Any = None, **given: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert given.pop("past_key_values", None) is None, "the old name warns"
        known = "cache" if "cache" in signature(super().forward).parameters else "past_key_values"
        return super().forward(input_ids=input_ids, **{known: cache}, **given)


def test_the_cache_is_given_by_the_name_that_the_models_code_has_for_it() -> None:
    renamed = tiny_llama()
    renamed.model.__class__ = Renamed
    own, lm = HfScorer(tiny_llama(), tiny_tokenizer()), HfScorer(renamed, tiny_tokenizer())
    kwargs = [{"until": ["?"], "max_gen_toks": most} for most in (6, 40)]
    asked = requests("generate_until", [*zip(("abc 012", "abc"), kwargs, strict=True)])
    assert lm.generate_until(asked) == own.generate_until(asked)
    asked = requests("loglikelihood", PAIRS)
    assert lm.loglikelihood(asked) == own.loglikelihood(asked)


@pytest.mark.parametrize("tied", [True, False])
def test_generation_ends_where_the_model_says_it_ends(tied: bool) -> None:
    """A model may end texts with more tokens than its tokenizer's one: Llama 3 and Gemma have two or three."""
    model, tokenizer = tiny_llama(tied=tied), tiny_tokenizer()
    options: dict[str, Any] = {"until": [], "max_gen_toks": 10, "do_sample": False}
    asked = requests("generate_until", [("abc", options)])
    (free,) = HfScorer(model, tokenizer).generate_until(asked)
    model.generation_config.eos_token_id = [3, tokenizer.encode(free[4])[0]]
    found = HfScorer(model, tokenizer).generate_until(asked)
    assert found == reference(model, tokenizer).generate_until(asked, disable_tqdm=True)


@each_model
def test_a_model_in_bfloat16_answers_as_lm_evals_own_engine_up_to_rounding(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = models()[name].bfloat16()
    asked = requests("loglikelihood", PAIRS[:14])
    expected = reference(model, tokenizer_for(name)).loglikelihood(asked, disable_tqdm=True)
    found = HfScorer(model, tokenizer_for(name)).loglikelihood(asked)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=0.05, abs=0.5)


# Packing


@pytest.mark.parametrize("name", TREES)
def test_packed_rows_give_what_plain_rows_give(name: str, zoo: dict[str, Any]) -> None:
    lm = HfScorer(zoo[name], tiny_tokenizer())
    asked = requests("loglikelihood", PAIRS)
    assert lm.packs
    assert lm.stems
    packed = lm.loglikelihood(asked)
    lm.packs = False
    assert_same(packed, lm.loglikelihood(asked))


SHOTS = "a 1\nb 2\nc 0\n"
FEW_SHOT = [(SHOTS + text(seed, 2 + seed % 5), choice) for seed in range(12) for choice in ("a", " b", "12")]
"""Questions after the same solved examples, short enough for a sliding window to see them all."""


@pytest.fixture
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the texts of these tests were long ones."""
    monkeypatch.setattr("llmevo.engines.scoring.packing.ROW_TOKENS", 16)
    monkeypatch.setattr("llmevo.engines.scoring.packing.LEAST_SAVED", 8)


class Passes:
    """What was computed: (stem, rows, length) of each pass through a model."""

    def __init__(self, lm: HfScorer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, int, int]] = []
        backbone: Any = lm._backbone  # pyright: ignore[reportPrivateUsage]
        forward = backbone.body.forward

        def watched(*args: Any, **options: Any) -> Any:
            cache = options.get("cache", options.get("past_key_values"))  # named by the version of transformers
            rows, length = options["input_ids"].shape
            self.seen.append((0 if cache is None else cache.get_seq_length(), rows, length))
            return forward(*args, **options)

        monkeypatch.setattr(backbone.body, "forward", watched)

    @property
    def tokens(self) -> int:
        return sum(rows * length for _, rows, length in self.seen)


@pytest.mark.usefixtures("small_rows")
@each_model
def test_examples_shared_by_questions_change_no_answer(
    name: str, zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = zoo[name], tokenizer_for(name)
    asked = requests("loglikelihood", FEW_SHOT)
    expected = reference(model, tokenizer).loglikelihood(asked, disable_tqdm=True)
    lm = HfScorer(model, tokenizer)
    passes = Passes(lm, monkeypatch)
    assert_same(lm.loglikelihood(asked), expected)
    assert any(stem == len(SHOTS) for stem, _, _ in passes.seen) == (name in TREES)
    naive = sum(len(context) + len(choice) - 1 for context, choice in FEW_SHOT)
    assert name not in TREES or passes.tokens < naive / 4


@pytest.mark.usefixtures("small_rows")
@each_model
def test_examples_shared_by_questions_change_no_generated_text(
    name: str, zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = zoo[name], tokenizer_for(name)
    options: dict[str, Any] = {"until": ["b", "\n"], "max_gen_toks": 6, "do_sample": False}
    asked = requests("generate_until", [(context, options) for context, _ in FEW_SHOT[::3]])
    expected = [reference(model, tokenizer).generate_until([one], disable_tqdm=True)[0] for one in asked]
    lm = HfScorer(model, tokenizer)
    passes = Passes(lm, monkeypatch) if name in TREES else None
    assert lm.generate_until(asked) == expected
    assert passes is None or any(stem == len(SHOTS) for stem, _, _ in passes.seen)


@pytest.mark.parametrize("tokens", [1, 40, 200, 100_000])
@pytest.mark.parametrize("row", [1, 30, 1000])
def test_the_size_of_batches_and_rows_changes_no_answer(
    tokens: int, row: int, zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmevo.engines.scoring.packing.ROW_TOKENS", row)
    monkeypatch.setattr("llmevo.engines.scoring.packing.LEAST_SAVED", row)
    monkeypatch.setattr("llmevo.engines.scoring.packing.LONG", max(2, row))
    asked = requests("loglikelihood", [*PAIRS, *FEW_SHOT])
    expected = HfScorer(zoo["llama"], tiny_tokenizer()).loglikelihood(asked)
    monkeypatch.setattr("llmevo.engines.scoring.hf.CPU_BATCH", tokens)
    monkeypatch.setattr("llmevo.engines.scoring.hf.GENERATED_BATCH", tokens)
    monkeypatch.setattr("llmevo.engines.scoring.backbone.HEAD_ROWS", row)
    monkeypatch.setattr("llmevo.engines.scoring.backbone.PIECE", {"cpu": tokens})
    lm = HfScorer(zoo["llama"], tiny_tokenizer())
    assert_same(lm.loglikelihood(asked), expected)


# The same to the last bit


@each_model
def test_equal_requests_get_equal_scores_to_the_last_bit_whatever_came_before(name: str) -> None:
    """A run is verified by running it again, in another process and with other candidates before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = models()[name].bfloat16()
    asked = requests("loglikelihood", [*PAIRS, *FEW_SHOT])
    rolling = requests("loglikelihood_rolling", [(text(8, 100),), (text(9, 30),)])
    options: dict[str, Any] = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    generating = requests("generate_until", [(context, options) for context, _ in FEW_SHOT[::3]])

    def answers(lm: HfScorer) -> Any:
        return lm.loglikelihood(asked), lm.loglikelihood_rolling(rolling), lm.generate_until(generating)

    lm = HfScorer(model, tokenizer_for(name))
    first = answers(lm)
    state = {key: weight.clone() for key, weight in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
    assert lm.loglikelihood(asked) != first[0]
    lm.loglikelihood(asked[:7])
    model.load_state_dict(state)
    assert answers(lm) == first
    assert answers(HfScorer(model, tokenizer_for(name))) == first


def test_texts_are_made_tokens_once(zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    lm = HfScorer(zoo["llama"], tokenizer)
    asked = requests("loglikelihood", PAIRS)
    first = lm.loglikelihood(asked)

    def encode(*_: Any, **__: Any) -> list[int]:
        raise AssertionError("a text was read again")

    monkeypatch.setattr(type(tokenizer), "encode", encode)
    monkeypatch.setattr("llmevo.engines.scoring.hf.packed_batches", encode)
    assert lm.loglikelihood(requests("loglikelihood", PAIRS)) == first


def test_what_does_not_fit_in_memory_is_made_again(zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests("loglikelihood", PAIRS)
    first = HfScorer(zoo["llama"], tiny_tokenizer()).loglikelihood(asked)
    monkeypatch.setattr("llmevo.engines.scoring.hf.KEPT_TOKENS", 10)
    monkeypatch.setattr("llmevo.engines.scoring.base.KEPT_CHARACTERS", 30)
    lm = HfScorer(zoo["llama"], tiny_tokenizer())
    assert lm.loglikelihood(asked) == lm.loglikelihood(asked) == first
    assert not lm._layouts  # pyright: ignore[reportPrivateUsage]


# Generation


def test_a_row_that_has_ended_leaves_the_batch(zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = HfScorer(zoo["llama"], tiny_tokenizer())
    options: dict[str, Any] = {"until": [], "max_gen_toks": 8, "do_sample": False}
    contexts = [text(seed, 5 + seed) for seed in range(6)]
    free = lm.generate_until(requests("generate_until", [(context, options) for context in contexts]))
    stops = [free[0][1], free[1][3]]
    asked = requests("generate_until", [(context, {**options, "until": stops}) for context in contexts])
    passes = Passes(lm, monkeypatch)
    found = lm.generate_until(asked)
    lengths = [min([text.find(stop) + 1 for stop in stops if stop in text] or [8]) for text in free]
    assert [rows for _, rows, _ in passes.seen] == [sum(n > step for n in lengths) for step in range(max(lengths))]
    assert found == reference(zoo["llama"], tiny_tokenizer()).generate_until(asked, disable_tqdm=True)


@pytest.mark.parametrize("wish", [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}])
def test_what_a_models_generation_config_asks_for_is_done(wish: dict[str, Any]) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    options: dict[str, Any] = {"until": [], "max_gen_toks": 30, "do_sample": False}
    asked = requests("generate_until", [(text(seed, 4 + seed // 2), options) for seed in range(6)])
    plain = HfScorer(model, tokenizer).generate_until(asked)
    for key, value in wish.items():
        setattr(model.generation_config, key, value)
    found = HfScorer(model, tokenizer).generate_until(asked)
    own = reference(model, tokenizer)
    assert found == [own.generate_until([one], disable_tqdm=True)[0] for one in asked] != plain


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": False, "repetition_penalty": 2.0}])
def test_a_model_whose_outputs_are_not_numbers_has_no_scores_and_no_texts(options: dict[str, Any]) -> None:
    model = tiny_llama()
    lm, options = HfScorer(model, tiny_tokenizer()), {"until": [], "max_gen_toks": 5, **options}
    with torch.no_grad():
        model.lm_head.weight[7] *= 1e30
        model.model.norm.weight.fill_(3e38)
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    with pytest.raises(CandidateError, match=r"not numbers \(NaN\); .*float16.*bfloat16 or float32"):
        lm.loglikelihood(requests("loglikelihood", [("abc", " d")]))
    with pytest.raises(CandidateError, match="not numbers"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("abc d",)]))
    with pytest.raises(CandidateError, match="not numbers"):
        lm.generate_until(requests("generate_until", [("abc", options)]))


@pytest.mark.parametrize("pair", [("Is it?", ""), ("", ""), ("", "<s>")])
def test_an_answer_without_a_token_is_named(pair: tuple[str, str], zoo: dict[str, Any]) -> None:
    lm = HfScorer(zoo["llama"], tiny_tokenizer())
    with pytest.raises(TaskError, match=f"the answer {pair[1]!r} to the question {pair[0]!r}".replace("?", r"\?")):
        lm.loglikelihood(requests("loglikelihood", [("Is it?", "yes"), pair]))


def test_a_question_without_a_token_is_named(zoo: dict[str, Any]) -> None:
    lm = HfScorer(zoo["llama"], tiny_tokenizer())
    with pytest.raises(TaskError, match="the question '' has no token"):
        lm.generate_until(requests("generate_until", [(text, {"max_gen_toks": 6}) for text in ("abc", "")]))


def test_a_reply_as_long_as_the_context_leaves_no_question(zoo: dict[str, Any]) -> None:
    lm = HfScorer(zoo["llama"], tiny_tokenizer())
    asked = requests("generate_until", [("abc", {"max_gen_toks": POSITIONS - 1, "until": []})])
    assert len(lm.generate_until(asked)) == 1
    asked = requests("generate_until", [("abc", {"max_gen_toks": POSITIONS})])
    with pytest.raises(TaskError, match=f"max_gen_toks: {POSITIONS} leaves no token of the {POSITIONS}"):
        lm.generate_until(asked)


def test_a_log_probability_may_be_infinite() -> None:
    check_numbers([-1.0, -math.inf])


def test_sampling_is_left_to_transformers(zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HfScorer, "_seeded", lambda *_: nullcontext())
    options: dict[str, Any] = {"until": ["\n"], "max_gen_toks": 10, "do_sample": True, "temperature": 5.0}
    asked = requests("generate_until", [("abc", options)])
    lm, own = HfScorer(zoo["llama"], tiny_tokenizer()), reference(zoo["llama"], tiny_tokenizer())
    with torch.random.fork_rng():
        torch.manual_seed(4)
        found = lm.generate_until(asked)
        torch.manual_seed(4)
        assert found == own.generate_until(asked, disable_tqdm=True)


# Texts in bytes


def byte_tokenizer() -> Any:
    """One token a byte, so that a letter is several tokens and a text may end within one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(("<s>", "</s>", *letters))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def test_letters_of_several_tokens_are_read_scored_and_written_as_by_lm_evals_own_engine() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), pad_token_id=1, bos_token_id=0, eos_token_id=1)
    lm, own = HfScorer(model, tokenizer), reference(model, tokenizer)
    pairs = [("Grüße, 世界", end) for end in ("。", "é", " ñandú", "🙂", "x")] + [("", "ß"), ("日本 ", "語")]
    asked = requests("loglikelihood", pairs)
    assert_same(lm.loglikelihood(asked), own.loglikelihood(asked, disable_tqdm=True))
    rolling = requests("loglikelihood_rolling", [("Zażółć gęślą jaźń 🙂",)])
    assert lm.loglikelihood_rolling(rolling) == pytest.approx(own.loglikelihood_rolling(rolling, disable_tqdm=True))
    free: dict[str, Any] = {"until": [], "max_gen_toks": 20, "do_sample": False}
    contexts = ["ü", "日本語", "naïve"]
    found = lm.generate_until(requests("generate_until", [(context, free) for context in contexts]))
    stops = [found[0][3:5], "é", found[1][2]]
    for options in (free, {**free, "until": stops}):
        generating = requests("generate_until", [(context, options) for context in contexts])
        assert lm.generate_until(generating) == own.generate_until(generating, disable_tqdm=True)


def test_a_stop_string_of_several_tokens_ends_the_text_however_its_bytes_came() -> None:
    stopped = StopStrings(byte_tokenizer(), ["。\n", ""])
    tokens = byte_tokenizer().encode("Das Ende。\n")
    assert [stopped(tokens[:i]) for i in range(1, len(tokens) + 1)] == [*[False] * (len(tokens) - 1), True]


@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_a_model_that_cannot_be_packed_is_not(name: str, zoo: dict[str, Any]) -> None:
    assert not HfScorer(zoo[name], tokenizer_for(name)).packs


def test_a_model_whose_answers_packing_would_change_is_not_packed(zoo: dict[str, Any]) -> None:
    lm = HfScorer(zoo["mpt"], tokenizer_for("mpt"))
    assert not lm.packs
    asked = requests("loglikelihood", PAIRS[:6])
    plain = [score for score, _ in lm.loglikelihood(asked)]
    lm.packs = True  # and this is why
    assert [score for score, _ in lm.loglikelihood(asked)] != pytest.approx(plain, abs=1e-2)


def test_the_answers_follow_the_weights_not_an_earlier_call(zoo: dict[str, Any]) -> None:
    model = tiny_llama(3)
    lm = HfScorer(model, tiny_tokenizer())
    asked = requests("loglikelihood", PAIRS[:8])
    before = lm.loglikelihood(asked)
    model.load_state_dict(zoo["llama"].state_dict())
    assert lm.loglikelihood(asked) == HfScorer(zoo["llama"], tiny_tokenizer()).loglikelihood(asked) != before


# Weights in place


Weights = dict[str, Tensor]


def weights(seed: int, tied: bool) -> Weights:
    """What a checkpoint of that model holds: a tied head is not written."""
    state: Weights = tiny_llama(seed, tied).state_dict()
    return {name: weight for name, weight in state.items() if not (tied and name == "lm_head.weight")}


@pytest.fixture(params=[False, True], ids=["head of its own", "tied head"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def engine(tmp_path: Path, tied: bool) -> HfEngine:
    folder = save_tiny(tmp_path, seed=9, tied=tied)
    return HfEngine(folder, folder, "float32", "cpu")


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    with fastest_products(model.device, model.dtype):
        return model(torch.arange(4, 20).unsqueeze(0)).logits


def test_loading_a_then_b_then_a_gives_the_model_a_again(engine: HfEngine, tied: bool) -> None:
    for seed in (1, 2, 1):
        engine.load(weights(seed, tied).items())
        assert torch.equal(logits(engine.model), logits(tiny_llama(seed, tied)))
    asked = requests("loglikelihood", PAIRS[:8])
    expected = HfScorer(tiny_llama(1, tied), tiny_tokenizer()).loglikelihood(asked)
    assert_same(engine.lm.loglikelihood(asked), expected)


@pytest.mark.parametrize("quantize", FORMATS)
def test_a_quantized_merge_answers_as_the_exported_model_does_after_rounding(
    tmp_path: Path, tied: bool, quantize: str
) -> None:
    folders = [save_tiny(tmp_path / name, seed, tied=tied) for seed, name in enumerate(("one", "two"))]
    engine = HfEngine(folders[0], folders[0], "bfloat16", "cpu", Merger(Sources()))
    recipe = Recipe.model_validate(
        {"merge_method": "linear", "dtype": "bfloat16"}
        | {"models": [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(folders, (0.7, 0.3), strict=True)]}
    )
    write_model(recipe, Sources.open(recipe.references), tmp_path / "out", 0)
    exported = Checkpoint(tmp_path / "out")
    served = quantizer(quantize, exported.shapes, read_object(tmp_path / "out" / "config.json"))
    rounded = {name: served.rounded(name, exported.tensor(name)).clone() for name in exported.shapes}
    save_file(rounded, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16")
    assert not torch.equal(logits(engine.model), logits(model))
    engine.swap(recipe)  # what the engine holds already is no reason to leave a weight as it is
    engine.swap(recipe, quantize)
    assert torch.equal(logits(engine.model), logits(model))


def test_a_tied_head_that_is_written_twice_is_loaded_once(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, tied=True)
    engine = HfEngine(folder, folder, "float32", "cpu")
    both = weights(1, True)
    engine.load({**both, "lm_head.weight": both["model.embed_tokens.weight"]}.items())
    assert torch.equal(logits(engine.model), logits(tiny_llama(1, True)))


def test_weights_of_another_type_are_rounded_to_the_engines(engine: HfEngine, tied: bool) -> None:
    engine.load((name, weight.bfloat16()) for name, weight in weights(1, tied).items())
    assert engine.model.dtype == torch.float32
    assert not torch.equal(logits(engine.model), logits(tiny_llama(1, tied)))
    assert logits(engine.model) == pytest.approx(logits(tiny_llama(1, tied)), abs=0.5)


def test_the_weights_given_are_copied_not_kept(engine: HfEngine, tied: bool) -> None:
    given = weights(1, tied)
    engine.load(given.items())
    for weight in given.values():
        weight.zero_()
    assert torch.equal(logits(engine.model), logits(tiny_llama(1, tied)))


NORM = "model.layers.1.input_layernorm.weight"


def wrong_shape(given: Weights) -> Weights:
    return {**given, NORM: torch.ones(33)}


def other_axes(given: Weights) -> Weights:
    name = "model.layers.0.mlp.up_proj.weight"
    return {**given, name: given[name].T}


def missing(given: Weights) -> Weights:
    return {name: weight for name, weight in given.items() if name != NORM}


def unknown(given: Weights) -> Weights:
    return {**given, "model.layers.0.other_layernorm.weight": torch.ones(32)}


def nothing(_: Weights) -> Weights:
    return {}


@pytest.mark.parametrize("spoil", [wrong_shape, other_axes, missing, unknown, nothing])
def test_weights_that_do_not_fit_cost_the_candidate_and_the_next_load_mends_it(
    engine: HfEngine, tied: bool, spoil: Any
) -> None:
    with pytest.raises(CandidateError, match=r"layers\.\d\."):
        engine.load(spoil(weights(1, tied)).items())
    engine.load(weights(2, tied).items())
    assert torch.equal(logits(engine.model), logits(tiny_llama(2, tied)))


def test_a_merge_that_fails_halfway_is_mended_by_the_next_load(engine: HfEngine, tied: bool) -> None:
    def torn() -> Iterator[tuple[str, Tensor]]:
        yield from [*weights(1, tied).items()][:5]
        raise CandidateError("the merged norm is not finite")

    with pytest.raises(CandidateError, match="not finite"):
        engine.load(torn())
    engine.load(weights(2, tied).items())
    assert torch.equal(logits(engine.model), logits(tiny_llama(2, tied)))


def test_an_engine_holds_its_model_in_the_type_it_was_asked_for(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    engine = HfEngine(folder, folder, "bfloat16", "cpu")
    assert engine.model.dtype == torch.bfloat16
    assert not engine.model.training
    assert engine.lm.loglikelihood(requests("loglikelihood", PAIRS[:3]))


def test_a_folder_that_transformers_cannot_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="empty"):
        HfEngine(tmp_path / "empty", tmp_path / "empty", "float32", "cpu")


@pytest.mark.parametrize("how", ["another tokenizer", "pickled base", "without a generation config"])
def test_texts_end_as_those_of_the_exported_model(how: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "chat")):
        save_tiny(tmp_path / name, seed)
    speaker = tmp_path / ("base" if how == "pickled base" else "chat")
    if how == "without a generation config":
        (speaker / "generation_config.json").unlink()
        config = read_object(speaker / "config.json")
        (speaker / "config.json").write_text(json.dumps({**config, "eos_token_id": [3, 5]}))
    else:
        settings = {"eos_token_id": [3, 5], "pad_token_id": 1, "repetition_penalty": 1.3}
        (speaker / "generation_config.json").write_text(json.dumps(settings))
    if how == "pickled base":
        torch.save(tiny_llama(0).state_dict(), speaker / "pytorch_model.bin")
        (speaker / "model.safetensors").unlink()
    models = [{"model": "chat", "parameters": {"weight": 0.5}}]
    keys = {"merge_method": "task_arithmetic", "base_model": "base", "models": models, "dtype": "float32"}
    recipe = Recipe.model_validate({**keys, "tokenizer_source": "base" if how == "pickled base" else "chat"})
    sources = Sources.open(recipe.references, tmp_path)
    folder, tokenizer = sources.engine_folder(recipe.donor), sources.folder(recipe.tokenizer_donor)
    engine = HfEngine(folder, tokenizer, "float32", "cpu", Merger(sources))
    write_model(recipe, sources, tmp_path / "out")
    exported: Any = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    found, wanted = (model.generation_config.to_dict() for model in (engine.model, exported))
    assert found == wanted
    assert found["eos_token_id"] == [3, 5]
