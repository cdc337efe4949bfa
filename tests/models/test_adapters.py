"""Adapters of every kind as sources: each equals what PEFT merges in float32, and what is not exact is refused."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from llmevo.errors import SourceError
from llmevo.models.adapters import LoraModel
from llmevo.models.architecture import HEADS
from llmevo.models.checkpoints import Checkpoint, LowRank
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from support.checkpoints import assert_near, new_checkpoint, quietly, tensors, weights_of
from support.quantized import change_config

QUERY = "model.layers.1.self_attn.q_proj"
EMBEDDINGS = "model.embed_tokens"
TARGETS = ["q_proj", "down_proj"]


def lora(**config: Any) -> Any:
    plain: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False}
    return peft.LoraConfig(**plain | config)


KINDS: dict[str, Callable[[], Any]] = {
    "plain": lora,
    "rslora, ranks by module": lambda: lora(
        use_rslora=True, rank_pattern={"down_proj": 4}, alpha_pattern={"q_proj": 1}
    ),
    "dora": lambda: lora(use_dora=True),
    "dora of embeddings": lambda: lora(use_dora=True, target_modules=["q_proj", "embed_tokens"]),
    "all biases": lambda: lora(bias="all"),
    "biases of its layers": lambda: lora(bias="lora_only", target_modules=["q_proj"]),
    "lora with biases": lambda: lora(lora_bias=True, target_modules=["q_proj"]),
    "embeddings and head": lambda: lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "saved modules": lambda: lora(modules_to_save=["lm_head", "embed_tokens", "norm"]),
    "rows of embeddings": lambda: lora(trainable_token_indices=[1, 5]),
    "rows of embeddings and head": lambda: lora(trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [2]}),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=3, target_modules=TARGETS),
    "loha": lambda: peft.LoHaConfig(
        r=2, alpha=3, target_modules=TARGETS, rank_pattern={"q_proj": 3}, init_weights=False
    ),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS, init_weights=False),
    "lokr, both low-rank": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=TARGETS, decompose_both=True, decompose_factor=4, init_weights=False
    ),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(r=3, target_modules=["q_proj", "k_proj"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[0, 63], target_modules=["embed_tokens"]),
}


def loaded(model: Path, rows: int | None) -> Any:
    """A model, with more or fewer rows of its embeddings if `rows` are given."""
    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if rows is not None:
        plain.resize_token_embeddings(rows, mean_resizing=False)
    return plain


def new_peft(folder: Path, model: Path, config: Any, binary: bool = False, rows: int | None = None) -> Path:
    """Save an adapter of any kind with random numbers in all that was trained."""
    adapted: Any = quietly(lambda: get_peft_model(loaded(model, rows), config))
    random = torch.Generator().manual_seed(4)
    trained = ("lora_", "hada_", "lokr_", "ia3_", "vera_lambda", "modules_to_save", "trainable_tokens", "ln_tuning")
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if any(part in name for part in trained) or (weight.requires_grad and name.endswith("bias")):
                weight.add_(torch.randn(weight.shape, generator=random) * 0.1)
    quietly(lambda: adapted.save_pretrained(folder, safe_serialization=not binary))
    return folder


def merged(model: Path, adapter: Path, rows: int | None = None) -> dict[str, Tensor]:
    adapted: Any = quietly(lambda: PeftModel.from_pretrained(loaded(model, rows), adapter))
    return dict(quietly(lambda: adapted.merge_and_unload()).state_dict())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(tmp_path_factory.mktemp("models") / "model", seed=1, family="qwen2", layers=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("adapters")

    def make(kind: str) -> Path:
        folder = root / re.sub(r"\W+", "-", kind)
        return folder if folder.exists() else new_peft(folder, model, KINDS[kind]())

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_equals_what_peft_merges(kind: str, model: Path, saved: Callable[[str], Path]) -> None:
    adapter, base = saved(kind), Checkpoint(model)
    adapted = LoraModel(base, adapter)
    assert_near(tensors(adapted), merged(model, adapter), rtol=1e-5, atol=2e-6)
    assert adapted.shapes == base.shapes
    assert any(not torch.equal(adapted.tensor(name), base.tensor(name)) for name in base.shapes)
    assert all(adapted.dtype(name) == torch.float32 for name in base.shapes)


@pytest.mark.parametrize("kind", ["plain", "embeddings and head", "adalora", "vera"])
def test_a_low_rank_change_stays_low_rank_over_the_models_own_weight(
    kind: str, model: Path, saved: Callable[[str], Path]
) -> None:
    base = Checkpoint(model)
    adapted = LoraModel(base, saved(kind))
    for name in (QUERY, EMBEDDINGS) if "embeddings" in kind else (QUERY,):
        weight = adapted.weight(f"{name}.weight")
        assert isinstance(weight, LowRank)
        assert weight.origin.data_ptr() == base.tensor(f"{name}.weight").data_ptr()


def test_a_layer_of_gpt2_has_rows_and_columns_exchanged(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    quietly(lambda: GPT2LMHeadModel(config).save_pretrained(tmp_path / "model"))
    for place, more in enumerate(({}, {"use_dora": True})):
        given = lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **more)
        adapter = new_peft(tmp_path / str(place), tmp_path / "model", given)
        adapted = LoraModel(Checkpoint(tmp_path / "model"), adapter)
        expected = {
            name: weight for name, weight in merged(tmp_path / "model", adapter).items() if "lm_head" not in name
        }
        assert_near(tensors(adapted), {name: expected[name] for name in adapted.shapes}, atol=2e-6)


@pytest.mark.parametrize("targets", [["attn.c_proj", "lm_head"], ["c_attn", "c_fc", "lm_head"]], ids=str)
def test_a_head_of_gpt2s_own_is_adapted_beside_its_exchanged_layers(targets: list[str], tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False)
    quietly(lambda: GPT2LMHeadModel(config).save_pretrained(tmp_path / "model"))
    for place, given in enumerate((lora(target_modules=targets), peft.IA3Config(target_modules=targets))):
        if place:
            given.feedforward_modules = []
        adapter = new_peft(tmp_path / str(place), tmp_path / "model", given)
        adapted = LoraModel(Checkpoint(tmp_path / "model"), adapter)
        expected = merged(tmp_path / "model", adapter)
        assert_near(tensors(adapted), {name: expected[name] for name in adapted.shapes}, atol=2e-6)


def old_gpt2(folder: Path) -> Callable[[str], str]:
    """Save a GPT-2 with the names of the hub's; return how transformers calls a tensor."""
    quietly(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder))
    old = {name.removeprefix("transformer."): weight for name, weight in weights_of(folder).items()}
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    return lambda name: f"transformer.{name}"


def qwen2_vl(folder: Path) -> Callable[[str], str]:
    text = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision)
    quietly(lambda: Qwen2VLForConditionalGeneration(config).save_pretrained(folder))
    return lambda name: name.replace("model.", "model.language_model.")


@pytest.mark.parametrize(("new_model", "target"), [(old_gpt2, "c_attn"), (qwen2_vl, "q_proj")])
def test_modules_are_found_whose_names_in_the_checkpoint_are_not_those_of_transformers(
    new_model: Callable[[Path], Callable[[str], str]], target: str, tmp_path: Path
) -> None:
    called = new_model(tmp_path / "model")
    before = weights_of(tmp_path / "model")
    names = [name for name in before if name.endswith(f"{target}.weight") and "visual" not in name]
    assert len(names) == 2
    full = called(names[1]).removesuffix(".weight")
    given = lora(target_modules=rf".*\.{target}", rank_pattern={re.escape(full): 3})
    kind = AutoModelForImageTextToText if new_model is qwen2_vl else AutoModelForCausalLM
    adapted: Any = quietly(lambda: get_peft_model(kind.from_pretrained(tmp_path / "model"), given))
    quietly(lambda: adapted.save_pretrained(tmp_path / "adapter"))
    expected = quietly(lambda: adapted.merge_and_unload()).state_dict()
    found = LoraModel(Checkpoint(tmp_path / "model"), tmp_path / "adapter")
    for name in names:
        assert_near({name: found.tensor(name)}, {name: expected[called(name)]}, atol=2e-6)
        assert not torch.allclose(found.tensor(name), before[name])


MOE: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


MIXTURES: dict[str, Callable[[], Any]] = {
    "stored as one": lambda: GptOssForCausalLM(GptOssConfig(**MOE, num_local_experts=3, num_experts_per_tok=2)),
    "stored by expert": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**MOE, moe_intermediate_size=24, num_experts=3, num_experts_per_tok=2)
    ),
    "stored under another name": lambda: MixtralForCausalLM(
        MixtralConfig(**MOE, num_local_experts=3, num_experts_per_tok=2)
    ),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_adapted_each_by_its_part_of_the_factors(kind: str, tmp_path: Path) -> None:
    made = MIXTURES[kind]()
    quietly(lambda: made.save_pretrained(tmp_path / "model"))
    target = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    given = lora(target_modules=["q_proj"], target_parameters=target, rank_pattern={"down_proj": 3})
    adapter = new_peft(tmp_path / "adapter", tmp_path / "model", given)
    adapted = LoraModel(Checkpoint(tmp_path / "model"), adapter)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    loaded: Any = quietly(lambda: PeftModel.from_pretrained(plain, adapter))
    quietly(lambda: loaded.merge_and_unload().save_pretrained(tmp_path / "merged"))
    expected = weights_of(tmp_path / "merged")
    assert_near(tensors(adapted), expected, atol=2e-6)
    changed = [n for n in expected if "experts" in n and not torch.equal(adapted.tensor(n), adapted.model.tensor(n))]
    assert len(changed) == (2 if kind == "stored as one" else 9)


@pytest.mark.parametrize("how", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_head_of_another_name_is_no_tied_one(how: dict[str, Any], tmp_path: Path) -> None:
    """LLaVA's checkpoint has `language_model.lm_head`, GPT-NeoX's `embed_out`."""
    text = {**MOE, "model_type": "llama"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(text_config=text, vision_config={**vision, "model_type": "clip_vision_model", "image_size": 8})
    quietly(lambda: LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava"))
    neox = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    quietly(lambda: GPTNeoXForCausalLM(neox).save_pretrained(tmp_path / "neox"))
    other = {key: [name.replace("q_proj", "dense") for name in names] for key, names in how.items()}
    for kind, folder, given in (
        (AutoModelForImageTextToText, tmp_path / "llava", how),
        (AutoModelForCausalLM, tmp_path / "neox", {"target_modules": ["dense"], **other}),
    ):
        adapted: Any = quietly(lambda k=kind, f=folder, g=given: get_peft_model(k.from_pretrained(f), lora(**g)))
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "modules_to_save" in name:
                    weight.add_(1.0)
        adapter = folder.with_name(f"{folder.name}-adapter")
        quietly(lambda a=adapted, to=adapter: a.save_pretrained(to))
        quietly(lambda a=adapted, to=adapter: a.merge_and_unload().save_pretrained(f"{to}-merged"))
        found, expected = LoraModel(Checkpoint(folder), adapter), weights_of(Path(f"{adapter}-merged"))
        (head,) = [name for name in found.shapes if HEADS.search(name)]
        assert_near({head: found.tensor(head)}, {head: expected[head]}, atol=2e-6)
        assert not torch.allclose(found.tensor(head), found.model.tensor(head))


# --- refused ----------------------------------------------------------------------------------------------------


def changed(adapter: Path, to: Path, change: Callable[[dict[str, Tensor]], Any] = len, **config: Any) -> Path:
    """A copy of an adapter with other weights, or whose config says something else."""
    shutil.copytree(adapter, to)
    weights = weights_of(to)
    change(weights)
    save_file(weights, to / "adapter_model.safetensors")
    change_config(to, "adapter_config.json", **config)
    return to


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("peft_type", "OFT", "peft_type is 'OFT'; llmevo merges LORA, ADALORA"),
        ("use_qalora", True, "use_qalora is True: its inputs are averaged in groups"),
        ("layer_replication", [[0, 2], [1, 3]], "layer_replication is .*: it repeats layers"),
        ("alora_invocation_tokens", [1, 2], "alora_invocation_tokens is .*: it acts only after"),
        ("kasa_config", {"beta": 1e-4}, "kasa_config is"),
        ("arrow_config", {"top_k": 2}, "arrow_config is"),
        ("use_bdlora", {"nblocks": 2}, "use_bdlora is"),
        ("use_dora", True, "use_dora is True, and the magnitudes .* are missing"),
        ("lora_bias", True, r"lora_B\.bias is missing"),
        ("modules_to_save", ["lm_head"], "modules_to_save names 'lm_head', and its weights are missing"),
        ("trainable_token_indices", [1, 2], "trainable_token_indices names tokens, and their rows .* are missing"),
    ],
)
def test_what_is_not_exact_or_not_whole_is_refused_by_its_key(
    key: str, value: Any, said: str, model: Path, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=said):
        LoraModel(Checkpoint(model), changed(saved("plain"), tmp_path / "adapter", **{key: value}))


def test_a_saved_module_that_no_model_of_the_kind_has_is_passed_over(
    model: Path, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = changed(saved("plain"), tmp_path / "adapter", modules_to_save=["classifier", "score"])
    assert_near(tensors(LoraModel(Checkpoint(model), adapter)), merged(model, adapter), rtol=1e-5, atol=2e-6)


def part(module: str, end: str) -> str:
    return f"base_model.model.{module}.{end}"


@pytest.mark.parametrize(
    ("kind", "name", "wrong", "said"),
    [
        ("dora", part(QUERY, "lora_magnitude_vector"), (15,), r"lora_magnitude_vector is \(15,\); it must be \(16,\)"),
        (
            "all biases",
            part(QUERY, "base_layer.bias"),
            (8,),
            r"base_layer\.bias \(8,\) does not fit .*q_proj\.bias \(16,\)",
        ),
        ("saved modules", part("model.norm", "weight"), (8,), r"norm\.weight \(8,\) does not fit"),
        ("embeddings and head", part(EMBEDDINGS, "lora_embedding_A"), (3, 64), r"it must be \(2, 64\).*has rank 2"),
        ("embeddings and head", part(EMBEDDINGS, "lora_embedding_B"), None, "lora_embedding_B is missing"),
        (
            "rows of embeddings",
            part(EMBEDDINGS, "token_adapter.trainable_tokens_delta"),
            (3, 16),
            r"are not the rows \[1, 5\]",
        ),
        ("lora with biases", part(QUERY, "lora_B.bias"), (8,), r"lora_B\.bias is \(8,\); it must be \(16,\)"),
        ("adalora", part(QUERY, "lora_E"), None, "lora_E is missing"),
        ("adalora", part(QUERY, "lora_A"), (4, 8), r"lora_A is \(4, 8\); it must be \(4, 16\)"),
        ("loha", part(QUERY, "hada_w2_b"), None, "hada_w2_b is missing"),
        ("loha", part(QUERY, "hada_w1_a"), (16, 2), r"hada_w1_a is \(16, 2\); it must be \(16, 3\)"),
        ("lokr", part(QUERY, "lokr_w1"), (2, 2), r"Kronecker product is \(8, 8\), which does not fit"),
        ("ia3", part("model.layers.0.self_attn.k_proj", "ia3_l"), (4, 1), r"ia3_l is \(4, 1\); it must be \(8, 1\)"),
        ("vera", "base_model.vera_A", None, r"vera_A is missing \(save_projection: false\)"),
        ("tokens", part(EMBEDDINGS, "trainable_tokens_delta"), (2, 15), r"are not the rows \[0, 63\]"),
    ],
)
def test_a_part_that_is_missing_or_of_another_shape_is_named(
    kind: str,
    name: str,
    wrong: tuple[int, ...] | None,
    said: str,
    model: Path,
    saved: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        old = weights.pop(name)
        if wrong:
            weights[name] = torch.ones(wrong, dtype=old.dtype)

    with pytest.raises(SourceError, match=said) as raised:
        LoraModel(Checkpoint(model), changed(saved(kind), tmp_path / "adapter", change))
    assert "\n" not in str(raised.value)


def test_a_tensor_of_another_kind_is_refused_by_name(model: Path, saved: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = changed(saved("plain"), tmp_path / "a", lambda w: w.update({part(QUERY, "lora_C.weight"): torch.ones(2)}))
    with pytest.raises(SourceError, match=r"lora_C\.weight is no part of an adapter of kind LORA"):
        LoraModel(Checkpoint(model), adapter)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_embeddings_that_are_the_head_as_well_are_not_changed_alone(target: str, tmp_path: Path) -> None:
    tied = new_checkpoint(tmp_path / "tied", family="qwen2", layers=1, tied=True)
    adapter = new_peft(tmp_path / "adapter", tied, lora(target_modules=["q_proj", target]))
    with pytest.raises(SourceError, match="changes the embeddings or the head alone"):
        LoraModel(Checkpoint(tied), adapter)


def test_rows_of_tied_embeddings_are_changed_in_both(tmp_path: Path) -> None:
    tied = new_checkpoint(tmp_path / "tied", family="qwen2", layers=1, tied=True)
    adapter = new_peft(tmp_path / "adapter", tied, lora(trainable_token_indices=[3]))
    expected = merged(tied, adapter)
    assert torch.equal(expected["lm_head.weight"], expected[f"{EMBEDDINGS}.weight"])
    torch.testing.assert_close(
        LoraModel(Checkpoint(tied), adapter).tensor(f"{EMBEDDINGS}.weight"), expected["lm_head.weight"]
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [3, 65]},
        {"modules_to_save": ["embed_tokens", "norm"]},
    ],
    ids=str,
)
def test_adapters_of_a_larger_vocabulary_equal_what_peft_merges(
    kind: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    base = new_checkpoint(tmp_path / "base", family="qwen2", layers=1, tied=tied)
    ties = {"ensure_weight_tying": True} if tied and "modules_to_save" in kind else {}
    adapter = new_peft(tmp_path / "adapter", base, lora(**kind, **ties), rows=66)
    expected, adapted = merged(base, adapter, rows=66), LoraModel(Checkpoint(base), adapter)
    if tied:
        assert torch.equal(expected.pop("lm_head.weight"), expected[f"{EMBEDDINGS}.weight"])
    assert_near(tensors(adapted), expected, rtol=1e-5, atol=2e-6)
    assert adapted.shapes[f"{EMBEDDINGS}.weight"] == (66, 16)


# --- files ------------------------------------------------------------------------------------------------------


def test_an_adapter_in_a_bin_file_is_read_as_one_in_safetensors(
    model: Path, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "binary").mkdir()
    shutil.copy(saved("plain") / "adapter_config.json", tmp_path / "binary")
    torch.save(weights_of(saved("plain")), tmp_path / "binary" / "adapter_model.bin")
    read = tensors(LoraModel(Checkpoint(model), tmp_path / "binary"))
    assert_near(read, tensors(LoraModel(Checkpoint(model), saved("plain"))), rtol=0, atol=0)
    with (tmp_path / "binary" / "adapter_model.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(SourceError, match=r"adapter_model\.bin is incomplete .*; download it again"):
        LoraModel(Checkpoint(model), tmp_path / "binary")


class Harmful:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("the code in the file was run",))


def test_a_bin_file_with_code_is_refused_and_the_code_not_run(tmp_path: Path) -> None:
    torch.save({"model.norm.weight": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin holds more than tensors, which could be harmful code"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Harmful()}))
    with pytest.raises(SourceError, match=r"pytorch_model\.bin (holds more|is incomplete)"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_bin_files_is_read_as_one_in_safetensors(tied: bool, tmp_path: Path) -> None:
    model = new_checkpoint(tmp_path / "model", family="qwen2", layers=1, tied=tied)
    weights = weights_of(model)
    both = {**weights, "lm_head.weight": weights[f"{EMBEDDINGS}.weight"]} if tied else weights
    (tmp_path / "binary").mkdir()
    shutil.copy(model / "config.json", tmp_path / "binary")
    names = [*both]
    shards = {f"pytorch_model-0000{n + 1}-of-00002.bin": names[n::2] for n in range(2)}
    if tied:
        shards = {"pytorch_model.bin": names}
    for file, held in shards.items():
        torch.save({name: both[name] for name in held}, tmp_path / "binary" / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "binary" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (one, other) = (ModelReference.parse(name) for name in ("model", "binary"))
    sources = Sources.open([one, other], tmp_path)
    for name, weight in weights.items():
        assert torch.equal(sources[other].tensor(name), weight)
    assert len(sources.files(other)) == len(shards)
    assert sources.engine_folder(one) == tmp_path / "model"
    assert weights_of(sources.engine_folder(other)).keys() == weights.keys()
    if not tied:
        (tmp_path / "binary" / "pytorch_model-00002-of-00002.bin").unlink()
        with pytest.raises(SourceError, match=r"lists \S+ in pytorch_model-00002-of-00002\.bin, which is missing"):
            Checkpoint(tmp_path / "binary")


def test_an_adapter_alone_is_its_model_with_it(model: Path, saved: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = changed(saved("plain"), tmp_path / "adapter", base_model_name_or_path=str(model))
    alone, both, base = (ModelReference.parse(t) for t in ("adapter", f"{model}+adapter", str(model)))
    sources = Sources.open([base, alone, both], tmp_path)
    assert_near(tensors(sources[alone]), tensors(sources[both]), rtol=0, atol=0)
    assert sources.folder(alone) == model
    assert sources.checksum(alone) == sources.checksum(both) != sources.checksum(base)
    change_config(adapter, "adapter_config.json", lora_alpha=7)
    assert Sources(tmp_path).checksum(alone) != sources.checksum(base)
    assert Sources(tmp_path).checksum(alone) == Sources(tmp_path).checksum(both)
    shutil.copyfile(model / "config.json", adapter / "config.json")  # some trainers write it beside the adapter
    beside = Sources.open([base, alone], tmp_path)
    assert_near(tensors(beside[alone]), tensors(Sources.open([base, both], tmp_path)[both]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, r"names no model \(base_model_name_or_path is None\); write .*: MODEL\+adapter"),
        ("org/base", r"its model org/base \(base_model_name_or_path\) cannot be found .*; write .*: MODEL\+adapter"),
        ("./gone", r"its model ./gone .*no such folder.*; write .*: MODEL\+adapter"),
        ("other", "on another adapter"),
    ],
)
def test_an_adapter_alone_whose_model_is_not_found_says_what_to_write(
    base: str | None, said: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    changed(saved("plain"), tmp_path / "adapter", base_model_name_or_path=base)
    shutil.copytree(saved("plain"), tmp_path / "other")
    if base == "other":
        change_config(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(SourceError, match=said):
        Sources.open([ModelReference.parse("adapter")], tmp_path)
