"""What a model's config says that its weights do not: equal shapes may still compute different things."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmevo.models.checkpoints import LoraModel, stored
from llmevo.models.references import ModelPath, ModelReference
from llmevo.run.preflight.base import Finding, Findings, folders, names
from llmevo.run.scorer import Scorer

FUNCTION = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "sliding_window",
    "partial_rotary_factor",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
)
"""Keys that decide what the same weights compute."""


THETA = 10000.0
"""The base of rotary embeddings where a config names none."""


ROWS = 64
"""Rows of a head that are compared with those of the embeddings."""


HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def functions(scorer: Scorer) -> Findings:
    """Keys of the config that differ from the donor's, whose config every candidate gets."""
    yield from _compared(scorer, lambda config: {key: config[key] for key in FUNCTION if config.get(key) is not None})


def rope(scorer: Scorer) -> Findings:
    """Rotary embeddings: a model tuned with other ones reads positions differently."""
    yield from _compared(scorer, rotary)


def rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base, scaling and longest text, whichever way the config writes them."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = given.pop("rope_theta", None) or config.get("rope_theta") or THETA
    if "type" in given:
        given["rope_type"] = given.pop("type")
    if given.get("rope_type") == "default":
        del given["rope_type"]
    longest = config.get("max_position_embeddings")
    return {"rope_theta": theta, "rope_scaling": given or "none", "max_position_embeddings": longest}


def _compared(scorer: Scorer, of: Any) -> Findings:
    (donor, first, _), *others = folders(scorer)
    wanted = of(scorer.sources.config(first))
    for name, reference, _ in others:
        found = of(scorer.sources.config(reference))
        differing = [key for key in wanted if key in found and found[key] != wanted[key]]
        if differing:
            yield Finding(
                name,
                ", ".join(f"{key} is {found[key]}, that of {donor} {wanted[key]}" for key in differing),
                f"Every candidate computes as {donor} says; check that the model still works so, or leave it out",
            )


def adapters(scorer: Scorer) -> Findings:
    """Adapters that say that they were trained on another model than the one they are put on."""
    for reference, name in names(scorer).items():
        source = scorer.sources[reference]
        if not isinstance(source, LoraModel):
            continue
        said = source.config.get("base_model_name_or_path")
        if isinstance(said, str) and said and not _is_called(reference, scorer.sources.folder(reference), said):
            yield Finding(
                name,
                f"it was trained on {said} (base_model_name_or_path in its adapter_config.json) and is put on"
                f" {reference.model}",
                "Check that both are the same weights: their shapes are equal, and no more could be checked",
            )


def _is_called(reference: ModelReference, folder: Path, name: str) -> bool:
    """Whether a model may be meant by a name: a hub id or a folder, of which the last part counts."""
    local = Path(name).expanduser()
    if local.is_absolute() and local.exists():
        return local.resolve() == folder.resolve()
    known = {reference.model.name, folder.name, folder.resolve().name}
    return ModelPath(path=name).name.lower() in {each.lower() for each in known}


def dtypes(scorer: Scorer) -> Findings:
    """Digits that the result will not have, and models that are stored with fewer than others."""
    kinds = {name: stored_dtype(scorer, reference) for name, reference, _ in folders(scorer)}
    written = scorer.config.genome.dtype
    finer = [name for name, kind in kinds.items() if kind == "float32" != written]
    if finer:
        yield Finding(
            ", ".join(finer),
            f"stored in float32, and the merge is written in {written}",
            "Set genome.dtype: float32 if the digits matter",
        )
    common = next(iter(kinds.values()))
    for name, kind in kinds.items():
        if kind != common and "float32" not in (kind, common):
            yield Finding(
                name,
                f"stored in {kind}, {next(iter(kinds))} in {common}: they are rounded differently",
                "Fetch it in the same type if there is one; what both say alike may count as a change",
            )


def stored_dtype(scorer: Scorer, reference: ModelReference) -> str:
    """The type of a model's largest tensor; of an adapter's model."""
    source = scorer.sources[reference]
    largest = max(source.shapes, key=lambda name: math.prod(source.shapes[name]))
    return str(stored(source.weight(largest)).dtype).removeprefix("torch.")


def tied_heads(scorer: Scorer) -> Findings:
    """Heads that one config ties to the embeddings and another does not."""
    (donor, first, _), *others = folders(scorer)
    tied = scorer.sources.config(first).get("tie_word_embeddings")
    for name, reference, _ in others:
        other = scorer.sources.config(reference).get("tie_word_embeddings")
        if None not in (tied, other) and tied != other:
            yield Finding(
                name,
                f"tie_word_embeddings is {str(other).lower()}, that of {donor} {str(tied).lower()}",
                f"Candidates have {donor}'s; what the other kind of head has learnt is lost or doubled",
            )
        elif tied and _own_head(scorer, reference):
            yield Finding(
                name,
                f"it has a head of its own, and {donor} ties its head to the embeddings (tie_word_embeddings)",
                "The head is merged and then not used; leave the model out if it was tuned",
            )


def _own_head(scorer: Scorer, reference: ModelReference) -> bool:
    source = scorer.sources[reference]
    if HEAD not in source.shapes or EMBEDDINGS not in source.shapes:
        return False
    head, embeddings = (stored(source.weight(name))[:ROWS] for name in (HEAD, EMBEDDINGS))
    return not torch.equal(head, embeddings)
