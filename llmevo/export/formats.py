"""The formats of a merge, by `--as`: a Hugging Face model, a LoRA adapter, a GGUF file, FP8, prepared experts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmevo.errors import UserError, nearest
from llmevo.export.cards import Relation, adapter_facts
from llmevo.export.experts import RECIPE, write_experts
from llmevo.export.fp8 import Fp8Model
from llmevo.export.gguf import TYPES, GgufModel
from llmevo.export.lora import LoraReport, write_merge
from llmevo.export.low_rank import Rank
from llmevo.export.pack import portable
from llmevo.merging.merger import Seed
from llmevo.merging.methods.registry import WIDEN
from llmevo.merging.recipe import Recipe
from llmevo.merging.tokenizer import chat_template
from llmevo.merging.writer import MergedModel, check_new, custom_code, whole_folder, write_model, write_texts
from llmevo.models.files import partial_folder, sync
from llmevo.models.references import ModelPath, on_this_machine, place_of
from llmevo.models.sources import Sources

NAMES = ("lora", "fp8", "experts", *(f"gguf:{kind}" for kind in TYPES))
"""The values of `--as`."""

Texts = Callable[[Relation, str], Mapping[str, str]]
"""The text files beside the weights, made of the result's relation to its parents and a sentence on its format."""


@dataclass(frozen=True)
class Written:
    """What was written."""

    done: str
    """A sentence for the terminal."""
    report: LoraReport | None = None
    """Of an adapter."""


@dataclass(frozen=True)
class Format:
    """A format with its options."""

    kind: Literal["model", "lora", "gguf", "fp8", "experts"] = "model"
    type: str = ""
    """GGUF's type of the matrices."""
    rank: Rank | None = None
    """The ranks of an adapter; None keeps all of an exact one, and 0.95 of the energy of others."""
    donor: Path | None = None
    """A GGUF file of the base; None for the one that the base was read from."""

    @classmethod
    def of(
        cls,
        as_: str | None,
        rank: str | int | None = None,
        energy: float | None = None,
        parameters: str | int | None = None,
        donor: Path | str | None = None,
    ) -> "Format":
        """Read the options `--as`, `--rank`, `--energy`, `--parameters` and `--donor`.

        Raises UserError for an unknown format, and for an option of another one.
        """
        if as_ is not None and as_ not in NAMES:
            hint = f"; write one of {', '.join(f'gguf:{kind}' for kind in TYPES)}" if as_.startswith("gguf") else ""
            raise UserError(f"--as {as_}: there is no such format{hint or nearest(as_, NAMES)}")
        ranks = {"--rank": rank, "--energy": energy, "--parameters": parameters}
        kind, _, type_ = (as_ or "model").partition(":")
        for option, value in ranks.items():
            if value is not None and kind != "lora":
                raise UserError(f"{option} {value}: only adapters have ranks; add --as lora, or leave {option} out")
        if donor is not None and kind != "gguf":
            raise UserError(f"--donor {donor}: only GGUF files need a donor; add --as gguf:q8_0, or leave --donor out")
        if kind == "gguf":
            return cls("gguf", type_, donor=Path(donor) if donor is not None else None)
        if kind == "lora":
            given = any(value is not None for value in ranks.values())
            return cls("lora", rank=Rank.of("auto" if rank is None else rank, energy, parameters) if given else None)
        return cls(kind if kind in ("fp8", "experts") else "model")

    def __str__(self) -> str:
        """The format in words, as after `written as`."""
        names = {"model": "a Hugging Face model", "lora": "a LoRA adapter", "fp8": "FP8", "experts": "prepared experts"}
        return names.get(self.kind) or f"GGUF ({self.type.upper()})"

    @property
    def rounding(self) -> str | None:
        """What `quantized` is in the log where weights were scored as this format has them: empty for those of the
        merge as it is; None for a format in which nothing is scored.
        """
        return {"model": "", "gguf": self.type, "fp8": "fp8"}.get(self.kind)

    def write(
        self,
        recipe: Recipe,
        sources: Sources,
        out: Path,
        seed: Seed,
        texts: Texts,
        trim: bool = True,
        to_share: bool = False,
    ) -> Written:
        """Merge a recipe into `out`, a new folder; with GGUF also a new file, if its name ends so.

        Of a result `to_share`, the files name the base without its place on this machine. Raises what `write_model`
        raises, and UserError for what the format cannot hold.
        """
        check_new(out)
        if out.suffix == ".gguf" and self.kind != "gguf":
            raise UserError(f"{out}: it would be a folder; add --as gguf:q8_0 for a GGUF file, or give another name")
        if recipe.merge_method == WIDEN and self.kind in ("lora", "experts"):
            raise UserError(f"--as {self.kind}: a model of {WIDEN} has more neurons than its base; write it whole")
        if recipe.mixture and self.kind != "model":
            raise UserError(
                f"--as {self.kind}: a mixture of experts is written as a Hugging Face folder only; leave --as out"
            )
        if self.kind == "lora":
            base = sources.without_adapter(recipe.donor)
            if base.model.expert is not None:
                raise UserError(f"--as lora: PEFT cannot load the base {base}, an expert of a mixture; leave --as out")
            named = portable(base) if to_share else on_this_machine(base, sources.root)
            return self._write_lora(recipe, sources, out, seed, texts, named.model)
        if self.kind == "gguf":
            return self._write_gguf(recipe, sources, out, seed, texts)
        if self.kind == "fp8":
            return self._write_fp8(MergedModel(recipe, sources, seed, trim), out, texts)
        if self.kind == "experts":
            count = write_experts(recipe, sources, out, seed, {})
            return Written(f"{out} has {count} prepared models; mergekit-yaml {out / RECIPE} MODEL merges them")
        write_model(recipe, sources, out, seed, texts("merge", ""), trim)
        kind = "ImageTextToText" if "vision_config" in sources.config(recipe.donor) else "CausalLM"
        if code := custom_code(sources.config(recipe.donor)):
            return Written(
                f"{out} has the weights of a model_type that transformers does not know: copy {', '.join(code)} and the"
                f" key auto_map of config.json from {recipe.donor} into it before it is loaded"
            )
        return Written(f"{out} is a Hugging Face model: AutoModelFor{kind}.from_pretrained({str(out)!r})")

    def _write_lora(
        self, recipe: Recipe, sources: Sources, out: Path, seed: Seed, texts: Texts, base: ModelPath
    ) -> Written:
        def beside(report: LoraReport) -> Mapping[str, str]:
            return {
                "mergekit_config.yml": recipe.seen_from(out, sources.root).to_yaml(),
                **({"chat_template.jinja": template} if (template := chat_template(recipe, sources)) else {}),
                **texts("adapter", adapter_facts(report)),
            }

        report = write_merge(recipe, sources, out, self.rank, seed, beside, base)
        return Written(f"{out} is a LoRA adapter for {report.servers}, on {base}", report)

    def _write_gguf(self, recipe: Recipe, sources: Sources, out: Path, seed: Seed, texts: Texts) -> Written:
        donor = self.donor or self._own_donor(recipe, sources)
        # Without trimming: the donor has a token for every row.
        made = GgufModel(MergedModel(recipe, sources, seed, trim=False), donor, self.type)
        kind = self.type.upper()
        if out.suffix == ".gguf":
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
                with partial_folder(out) as folder:
                    made.write(folder / out.name)
                    sync(folder / out.name)
                    (folder / out.name).replace(out)
                    sync(out.parent)
            except OSError as error:
                raise UserError(f"{out} cannot be written ({error})") from error
            return Written(f"{out} is a GGUF file ({kind}): llama-server -m {out}")
        name = f"{out.resolve().name}-{kind}.gguf"
        with whole_folder(out) as folder:
            made.write(folder / name)
            relation: Relation = "merge" if self.type in ("f16", "bf16") else "quantized"
            said = f"`{name}` is a GGUF file for llama.cpp ({kind})."
            write_texts(
                folder, {"mergekit_config.yml": recipe.seen_from(out, sources.root).to_yaml(), **texts(relation, said)}
            )
        return Written(f"{out} has a GGUF file ({kind}): llama-server -m {out / name}")

    def _own_donor(self, recipe: Recipe, sources: Sources) -> Path:
        """Return the GGUF file that the base was read from. Raises UserError where it is none."""
        found = place_of(recipe.donor.model, sources.root)
        if found.suffix == ".gguf":
            return found
        raise UserError(
            f"--as gguf:{self.type} needs --donor FILE.gguf: a GGUF file of {recipe.donor.model}, whose metadata and"
            " tokenizer the result gets"
        )

    def _write_fp8(self, model: MergedModel, out: Path, texts: Texts) -> Written:
        made = Fp8Model(model)
        with whole_folder(out) as folder:
            model.write(folder, made.weights(), made.shapes, {"quantization_config": made.config})
            write_texts(folder, texts("quantized", "The linear layers are in FP8 (e4m3), with a scale a channel."))
        return Written(f"{out} is a Hugging Face model in FP8 for vLLM: vllm serve {out}")
