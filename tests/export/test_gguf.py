"""Merges as GGUF files: what transformers reads from them is what was merged."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GgufConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmevo.errors import UserError
from llmevo.export.formats import Format
from llmevo.export.gguf import llama3_factors
from llmevo.export.merge import merge
from llmevo.merging.recipe import Recipe
from llmevo.models.quantize import quantizer
from llmevo.models.sources import Sources
from support.checkpoints import new_adapter, quietly, weights_of
from support.gguf_donor import GEMMA, LLAMA, new_donor, shapes_of
from support.tiny_model import save_tiny, tiny_llama, tiny_tokenizer
from support.workspace import Workspace

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
WIDE: dict[str, Any] = {**SIZES, "head_dim": 128}
FAMILIES: dict[str, tuple[Any, str]] = {
    "llama": (lambda: tiny_llama(num_key_value_heads=2, intermediate_size=64), "llama"),
    "llama, tied": (lambda: tiny_llama(tied=True, intermediate_size=64), "llama"),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), "qwen2"),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE, tie_word_embeddings=True)), "qwen3"),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, query_pre_attn_scalar=8)), "gemma2"),
}


def save(folder: Path, family: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = FAMILIES[family][0]()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3 + (1.0 if "norm" in name and "gemma" not in family else 0.0))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def donor_of(folder: Path, family: str, file: Path, **changes: Any) -> Path:
    architecture = FAMILIES[family][1]
    names = GEMMA if architecture == "gemma2" else LLAMA
    return new_donor(file, folder, architecture, shapes_of(weights_of(folder), names), **changes)


def recipe_of(*names: str, dtype: str = "float32") -> Recipe:
    models = [{"model": name, "parameters": {"weight": weight}} for name, weight in zip(names, (0.6, 0.4), strict=True)]
    return Recipe.model_validate({"merge_method": "linear", "models": models, "dtype": dtype})


def read(file: Path) -> Any:
    return quietly(
        lambda: AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    ).eval()


def replies(model: Any) -> list[list[int]]:
    prompts = torch.tensor([[5, 6, 7], [20, 33, 41]])
    return model.generate(prompts, max_new_tokens=12, do_sample=False, pad_token_id=1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_merge_and_answers_as_it_does(family: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        save(tmp_path / name, family, seed)
    donor = donor_of(tmp_path / "one", family, tmp_path / "base.gguf")
    recipe = recipe_of("one", "two")
    merge(recipe, tmp_path / "merged", root=tmp_path)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    wanted: dict[str, Tensor] = plain.state_dict()
    for kind, most in (("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 2e-2), ("q4_0", 0.2)):
        merge(recipe, tmp_path / kind, as_=f"gguf:{kind}", donor=donor, root=tmp_path)
        found = read(tmp_path / kind / f"{kind}-{kind.upper()}.gguf")
        state = found.state_dict()
        assert state.keys() == wanted.keys()
        for name, weight in wanted.items():
            error = float((state[name] - weight).norm() / weight.norm())
            assert error <= (1e-6 if weight.dim() == 1 else most), (kind, name, error)
        if kind == "f16":
            if family == "gemma2":  # transformers reads not all of its config (soft caps)
                answering: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
                answering.load_state_dict(state)
            else:
                answering = found
            assert replies(answering) == replies(plain)
            prompt = torch.tensor([[5, 6, 7]])
            assert torch.allclose(answering(prompt).logits, plain(prompt).logits, atol=0.05)


def test_what_is_scored_quantized_is_what_the_file_holds(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        save(tmp_path / name, "qwen2", seed)
    donor = donor_of(tmp_path / "one", "qwen2", tmp_path / "base.gguf")
    recipe = recipe_of("one", "two", dtype="bfloat16")
    merge(recipe, tmp_path / "merged", root=tmp_path)
    merged = weights_of(tmp_path / "merged")
    for kind in ("q8_0", "q4_0"):
        merge(recipe, tmp_path / "out.gguf", as_=f"gguf:{kind}", donor=donor, root=tmp_path)
        rounding = quantizer(kind, {name: weight.shape for name, weight in merged.items()}, {"model_type": "qwen2"})
        tensors = {
            t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in GGUFReader(tmp_path / "out.gguf").tensors
        }
        (tmp_path / "out.gguf").unlink()
        scored = {name: rounding.rounded(name, weight) for name, weight in merged.items()}
        assert torch.equal(tensors["token_embd.weight"].bfloat16(), scored["model.embed_tokens.weight"])
        assert torch.equal(tensors["blk.1.ffn_down.weight"].bfloat16(), scored["model.layers.1.mlp.down_proj.weight"])
        assert torch.equal(tensors["blk.0.attn_q.weight"].bfloat16(), scored["model.layers.0.self_attn.q_proj.weight"])
        assert torch.equal(tensors["blk.0.attn_q.bias"], merged["model.layers.0.self_attn.q_proj.bias"].float())


def test_metadata_and_tokenizer_are_the_donors(workspace: Workspace) -> None:
    donor = donor_of(Path("base"), "llama, tied", Path("base.gguf"))
    Path("recipe.yml").write_text(recipe_of("one", "two").to_yaml())
    status, printed = workspace.llmevo("merge", "recipe.yml", "out", "--as", "gguf:q8_0", "--donor", "base.gguf")
    assert (status, "out/out-Q8_0.gguf" in printed) == (0, True), printed
    before, after = GGUFReader(donor), GGUFReader(Path("out/out-Q8_0.gguf"))
    own = {"GGUF.kv_count", "general.file_type", "general.quantization_version"}
    for key in before.fields.keys() - own:
        assert after.fields[key].contents() == before.fields[key].contents(), key
    assert after.fields["general.file_type"].contents() == 7
    assert {tensor.name for tensor in after.tensors} == {tensor.name for tensor in before.tensors}
    assert {file.name for file in Path("out").iterdir()} == {"out-Q8_0.gguf", "README.md", "mergekit_config.yml"}
    assert "base_model_relation" not in Path("out/README.md").read_text()  # its parents are on this machine only


def test_a_gguf_source_is_its_own_donor_and_an_exported_run_is_asked_the_same(workspace: Workspace) -> None:
    run = workspace
    run.finished()
    donor_of(Path("base"), "llama, tied", Path("base.gguf"))
    status, printed = run.llmevo("export", "run", "out", "--as", "gguf:f16")
    assert (status, "needs --donor FILE.gguf: a GGUF file of base" in printed) == (2, True), printed
    status, printed = run.llmevo("export", "run", "whole.gguf", "--as", "gguf:f16", "--donor", "base.gguf")
    assert status == 0, printed
    assert run.llmevo("export", "run", "plain")[0] == 0
    assert replies(read(Path("whole.gguf"))) == replies(AutoModelForCausalLM.from_pretrained("plain").eval())
    sources = Sources(Path())
    recipe = Recipe.model_validate(
        {"merge_method": "linear", "models": [{"model": "./whole.gguf", "parameters": {"weight": 1.0}}]}
    )
    assert Format("gguf", "f16")._own_donor(recipe, sources).name == "whole.gguf"  # pyright: ignore[reportPrivateUsage]


BROKEN = {
    "block_count": ({"block_count": 3}, "llama.block_count is 3, and 2 in the merge's config.json"),
    "rotary": ({"attention.head_count": 2}, "llama.attention.head_count is 2, and 4"),
    "token": ({"tokens": ["<unk>", "<pad>", "<s>", "<end>"]}, "token 3 is '<end>' there and '</s>' in the merge"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_donor_of_another_model_is_refused_with_the_key_that_differs(case: str, workspace: Workspace) -> None:
    changes, says = BROKEN[case]
    donor_of(Path("base"), "llama, tied", Path("base.gguf"), **changes)
    Path("recipe.yml").write_text(recipe_of("one", "two").to_yaml())
    status, printed = workspace.llmevo("merge", "recipe.yml", "out", "--as", "gguf:f16", "--donor", "base.gguf")
    assert (status, says in printed, printed.count("\n")) == (2, True, 1), printed
    assert not Path("out").exists()


def test_a_donor_whose_positions_are_scaled_otherwise_is_refused(workspace: Workspace) -> None:
    donor = donor_of(Path("base"), "llama, tied", Path("base.gguf"))
    for kind in ("linear", "yarn", "llama3"):
        rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
        for name in ("one", "two"):
            file = workspace.root / name / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": rope}))
        with pytest.raises(UserError, match=f"its positions are scaled by nothing .* and by {kind} in the merge's"):
            merge(recipe_of("one", "two"), "out", as_="gguf:f16", donor=donor)


def test_donors_with_other_tensors_vocabularies_and_files_that_are_none(workspace: Workspace) -> None:
    shapes = shapes_of(weights_of(Path("base")), LLAMA)
    less = {name: shape for name, shape in shapes.items() if name != "blk.1.ffn_up.weight"}
    more = {**shapes, "blk.0.attn_sinks.weight": (4,)}
    wider = {**shapes, "blk.0.ffn_up.weight": (64, 32)}
    for number, (held, says) in enumerate(
        (
            (less, "it lacks the tensor blk.1.ffn_up.weight"),
            (more, "it has the tensor blk.0.attn_sinks.weight, which the merge lacks"),
            (wider, "blk.0.ffn_up.weight is (64, 32), and (48, 32) in the merge"),
        )
    ):
        donor = new_donor(Path(f"{number}.gguf"), Path("base"), "llama", held)
        with pytest.raises(UserError, match=says.replace("(", r"\(").replace(")", r"\)")):
            merge(recipe_of("one", "two"), "out", as_="gguf:f16", donor=donor)
    other = new_donor(Path("other.gguf"), Path("base"), "qwen2", shapes)
    with pytest.raises(UserError, match=r"general.architecture is 'qwen2', and the merge is a llama"):
        merge(recipe_of("one", "two"), "out", as_="gguf:f16", donor=other)
    Path("text.gguf").write_text("a text")
    Path("cut.gguf").write_bytes(donor_of(Path("base"), "llama, tied", Path("base.gguf")).read_bytes()[:900])
    for name in ("text.gguf", "cut.gguf", "away.gguf"):
        with pytest.raises(UserError, match=f"--donor {name}: cannot be read as a GGUF file"):
            merge(recipe_of("one", "two"), "out", as_="gguf:f16", donor=name)
    assert not [path for path in workspace.root.iterdir() if path.name.startswith((".out", "out"))]


@pytest.mark.usefixtures("workspace")
def test_an_architecture_without_a_known_layout_is_refused_by_its_name() -> None:
    donor = donor_of(Path("base"), "llama, tied", Path("base.gguf"))
    for name in ("one", "two"):
        file = Path(name, "config.json")
        file.write_text(file.read_text().replace('"model_type": "llama"', '"model_type": "olmo"'))
    with pytest.raises(UserError, match="the layout of model_type 'olmo' in GGUF is not known"):
        merge(recipe_of("one", "two"), "out", as_="gguf:f16", donor=donor)


def test_numbers_that_float16_cannot_hold_are_refused_and_leave_nothing(workspace: Workspace) -> None:
    donor = donor_of(Path("base"), "llama, tied", Path("base.gguf"))
    large = {"merge_method": "linear", "models": [{"model": "one", "parameters": {"weight": 1e6}}], "dtype": "float32"}
    recipe = Recipe.model_validate({**large, "parameters": {"normalize": False}})
    with pytest.raises(UserError, match="numbers that float16 cannot hold; use gguf:bf16"):
        merge(recipe, "out.gguf", as_="gguf:f16", donor=donor)
    assert not [path for path in workspace.root.iterdir() if "out" in path.name]


def test_the_alignment_of_the_donor_is_kept(tmp_path: Path) -> None:
    save_tiny(tmp_path / "one", 1, tied=True)
    save_tiny(tmp_path / "two", 2, tied=True)
    donor = donor_of(tmp_path / "one", "llama, tied", tmp_path / "base.gguf")
    raw = bytearray(donor.read_bytes())
    key = b"general.name"
    place = raw.index(key) - 8
    added = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 64)
    raw[16:24] = struct.pack("<Q", struct.unpack_from("<Q", raw, 16)[0] + 1)
    raw[place:place] = added
    (tmp_path / "aligned.gguf").write_bytes(raw)
    merge(
        recipe_of("one", "two"), tmp_path / "out.gguf", as_="gguf:bf16", donor=tmp_path / "aligned.gguf", root=tmp_path
    )
    reader = GGUFReader(tmp_path / "out.gguf")
    assert reader.alignment == 64
    assert all(tensor.data_offset % 64 == 0 for tensor in reader.tensors)
    assert replies(read(tmp_path / "out.gguf"))


def test_special_tokens_and_template_are_those_of_the_tokenizer_that_the_recipe_names(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        save_tiny(tmp_path / name, seed, tied=True)
    file = tmp_path / "two" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": "a", "pad_token": None}))
    (tmp_path / "two" / "chat_template.jinja").write_text("{{ messages }}")
    donor = donor_of(tmp_path / "one", "llama, tied", tmp_path / "base.gguf")
    for source, end, template in (("two", tiny_tokenizer().vocab["a"], "{{ messages }}"), ("base", 3, None)):
        recipe = Recipe.model_validate({**recipe_of("one", "two").as_dict(), "tokenizer_source": source})
        merge(recipe, tmp_path / f"as-{source}.gguf", as_="gguf:bf16", donor=donor, root=tmp_path)
        found = GGUFReader(tmp_path / f"as-{source}.gguf")
        assert found.fields["tokenizer.ggml.eos_token_id"].contents() == end
        field = found.fields.get("tokenizer.chat_template")
        assert (field.contents() if field else None) == template
        assert len(found.fields["tokenizer.ggml.tokens"].contents()) == len(tiny_tokenizer())


@pytest.mark.usefixtures("workspace")
def test_the_tokens_that_a_merge_gets_from_several_models_are_compared_with_the_donors() -> None:
    for seed, name in enumerate(("padded", "chat")):
        tiny_llama(seed, vocab_size=104).save_pretrained(name)
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]} if seed else {})
        tokenizer.save_pretrained(name)
    models = [{"model": "chat", "parameters": {"weight": 0.7}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": "padded", "models": models}
    union = Recipe.model_validate({**recipe, "tokenizer": {"source": "union", "pad_to_multiple_of": 104}})
    shapes = shapes_of(weights_of(Path("padded")), LLAMA)
    donor = new_donor(Path("padded.gguf"), Path("padded"), "llama", shapes)
    with pytest.raises(UserError, match=r"token 100 is '\[PAD100\]' there and '<\|im_start\|>' in the merge"):
        merge(union, "out.gguf", as_="gguf:f16", donor=donor)
    merge(union, "out.gguf", as_="gguf:f16", donor=new_donor(Path("chat.gguf"), Path("chat"), "llama", shapes))


@pytest.mark.usefixtures("workspace")
def test_the_factors_of_llama_3_are_those_of_the_config() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    for name, factor in (("short", 8.0), ("long", 32.0)):
        save_tiny(Path(name), 0, rope_parameters={**rope, "factor": factor})
    config = AutoConfig.from_pretrained("short")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    wanted = (1 / 10000.0 ** (torch.arange(0, 8, 2) / 8) / scaled).numpy()
    assert llama3_factors(config.to_dict(), config.rope_parameters) == pytest.approx(wanted, rel=1e-5)
    shapes = shapes_of(weights_of(Path("short")), LLAMA)
    donor = new_donor(Path("short.gguf"), Path("short"), "llama", shapes, rope_freqs=wanted)
    one = "merge_method: linear\nmodels: [{{model: {}, parameters: {{weight: 1}}}}]"
    merge(Recipe.from_yaml(one.format("short")), "short-out.gguf", as_="gguf:f16", donor=donor)
    with pytest.raises(UserError, match=r"its rope_freqs.weight are up to 8, and 32 by the merge's config.json"):
        merge(Recipe.from_yaml(one.format("long")), "long-out.gguf", as_="gguf:f16", donor=donor)


@pytest.mark.usefixtures("workspace")
def test_a_recipe_that_changes_layers_or_positions_is_not_sent_to_another_donor() -> None:
    donor = donor_of(Path("base"), "llama, tied", Path("base.gguf"))
    path = "slices: [{sources: [{model: base, layer_range: [0, 2]}]}, {sources: [{model: base, layer_range: [1, 2]}]}]"
    for text in (f"merge_method: passthrough\n{path}", "merge_method: linear\nmodels: [{model: base}]\nrope: 2"):
        with pytest.raises(UserError, match=r"the recipe changes layers or positions.* convert_hf_to_gguf.py"):
            merge(
                Recipe.from_yaml(text.replace("{model: base}", "{model: base, parameters: {weight: 1}}")),
                "out.gguf",
                as_="gguf:f16",
                donor=donor,
            )


@pytest.mark.usefixtures("workspace")
def test_the_tokenizer_of_an_adapter_is_the_files() -> None:
    new_adapter(Path("adapter"), Path("base"), 1)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = "{{ 'of the adapter' }}", "~"
    tokenizer.save_pretrained("adapter")
    donor = donor_of(Path("base"), "llama, tied", Path("base.gguf"))
    for base in ("", "base_model: base\n"):
        method = "task_arithmetic" if base else "linear"
        models = "models: [{model: base+adapter, parameters: {weight: 1}}]\ntokenizer_source: base+adapter"
        merge(
            Recipe.from_yaml(f"merge_method: {method}\n{base}{models}"), f"{method}.gguf", as_="gguf:f16", donor=donor
        )
        found = GGUFReader(f"{method}.gguf").fields
        assert found["tokenizer.chat_template"].contents() == "{{ 'of the adapter' }}"
        assert found["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
