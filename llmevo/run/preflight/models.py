"""Checks of the models' configs, weights and licences: equal shapes may still compute different things."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmevo.merging.merger import Merger
from llmevo.merging.vocabulary import plain
from llmevo.models.adapters import LoraModel
from llmevo.models.architecture import routers_of, text_config
from llmevo.models.checkpoints import stored
from llmevo.models.licences import DUTIES, FREE, UNKNOWN, parts
from llmevo.models.references import ModelPath, ModelReference
from llmevo.run.preflight.base import Finding, Findings, folders, names
from llmevo.run.scorer import Scorer
from llmevo.search.encode import PATH
from llmevo.search.paths.registry import PATHS
from llmevo.search.prompts.question import SliceGeometry

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
"""Keys of a config that decide what the same weights compute."""

DEFAULT_THETA = 10000.0
"""The base of rotary embeddings where a config names none."""

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"

COMPARED_ROWS = 64
"""Rows of a head that are compared with those of the embeddings."""

ALIKE = 0.98
"""A cosine of task vectors from which two models are nearly the same."""

FAR = 0.7
"""The norm of a task vector, relative to the base, from which the model is hardly a fine-tune of it."""

LOST = 0.5
"""The share of a merge's change that rounding may lose without a warning."""


def functions(scorer: Scorer) -> Findings:
    """Keys of the config that differ from the donor's, whose config every candidate gets."""
    return _compared(scorer, lambda config: {key: config[key] for key in FUNCTION if config.get(key) is not None})


def rope(scorer: Scorer) -> Findings:
    """Rotary embeddings: a model tuned with other ones reads positions differently."""
    return _compared(scorer, _rotary)


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base, scaling and context length, in whichever form the config has them."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = given.pop("rope_theta", None) or config.get("rope_theta") or DEFAULT_THETA
    if "type" in given:
        given["rope_type"] = given.pop("type")
    if given.get("rope_type") == "default":
        del given["rope_type"]
    longest = config.get("max_position_embeddings")
    return {"rope_theta": theta, "rope_scaling": given or "none", "max_position_embeddings": longest}


def _compared(scorer: Scorer, facts_of: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Findings:
    (donor, first, _), *others = folders(scorer)
    wanted = facts_of(text_config(scorer.sources.own_config(first)))
    for name, reference, _ in others:
        found = facts_of(text_config(scorer.sources.own_config(reference)))
        differing = [key for key in wanted if key in found and found[key] != wanted[key]]
        if differing:
            yield Finding(
                name,
                ", ".join(f"{key} is {found[key]}, that of {donor} {wanted[key]}" for key in differing),
                f"Every candidate computes as {donor} says; check that the model still works so, or leave it out",
            )


def adapters(scorer: Scorer) -> Findings:
    """Adapters whose config names another model than the one they are applied to."""
    for reference, name in names(scorer).items():
        source = plain(scorer.sources).own(reference)
        if not isinstance(source, LoraModel):
            continue
        trained_on = source.config.get("base_model_name_or_path")
        if (
            isinstance(trained_on, str)
            and trained_on
            and not _is_called(reference, scorer.sources.folder(reference), trained_on)
        ):
            yield Finding(
                name,
                f"it was trained on {trained_on} (base_model_name_or_path in its adapter_config.json) and is put on"
                f" {reference.model}",
                "Check that both are the same weights: their shapes are equal, and no more could be checked",
            )


def _is_called(reference: ModelReference, folder: Path, name: str) -> bool:
    """Return whether a hub id or a folder may mean a model; the last part of a hub id decides."""
    local = Path(name).expanduser()
    if local.is_absolute() and local.exists():
        return local.resolve() == folder.resolve()
    known = {reference.model.name, folder.name, folder.resolve().name}
    return ModelPath(path=name).name.lower() in {each.lower() for each in known}


def dtypes(scorer: Scorer) -> Findings:
    """Precision that the result loses, and models that are stored in another half precision than the first."""
    kinds = {name: stored_dtype(scorer, reference) for name, reference, _ in folders(scorer)}
    written = scorer.config.genome.dtype
    finer = [name for name, kind in kinds.items() if kind == "float32" != written]
    if finer:
        yield Finding(
            ", ".join(finer),
            f"stored in float32, and the merge is written in {written}",
            "Set genome.dtype: float32 if the digits matter",
        )
    first, common = next(iter(kinds.items()))
    for name, kind in kinds.items():
        if kind != common and "float32" not in (kind, common):
            yield Finding(
                name,
                f"stored in {kind}, {first} in {common}: they are rounded differently",
                "Fetch it in the same type if there is one; equal weights may count as a change",
            )


def stored_dtype(scorer: Scorer, reference: ModelReference) -> str:
    """The type of a model's largest tensor; for an adapter that of its model."""
    source = plain(scorer.sources)[reference]
    largest = max(source.shapes, key=lambda name: math.prod(source.shapes[name]))
    return str(source.dtype(largest)).removeprefix("torch.")


def paths(scorer: Scorer) -> Findings:
    """Layer paths that the optimizer does not try."""
    config = scorer.config
    own = any(isinstance(entry, Mapping) and PATH in entry for entry in config.search.start_from)
    if config.genome.path and config.search.optimizer not in PATHS and config.search.spaces != "both" and not own:
        yield Finding(
            "genome.path",
            f"{config.search.optimizer} searches weights, and no candidate will be a layer path",
            "Set `optimizer: paths` or `spaces: both` under `search:`, or leave genome.path out",
        )


def tied_heads(scorer: Scorer) -> Findings:
    """Heads that one config ties to the embeddings and another does not."""
    (donor, first, _), *others = folders(scorer)
    tied = scorer.sources.own_config(first).get("tie_word_embeddings")
    for name, reference, _ in others:
        other = scorer.sources.own_config(reference).get("tie_word_embeddings")
        if None not in (tied, other) and tied != other:
            yield Finding(
                name,
                f"tie_word_embeddings is {str(other).lower()}, that of {donor} {str(tied).lower()}",
                f"Candidates have {donor}'s kind of head; check that both kinds are meant",
            )
        elif tied and _has_own_head(scorer, reference):
            yield Finding(
                name,
                f"it has a head of its own, and {donor} ties its head to the embeddings (tie_word_embeddings)",
                "The head is merged and then not used; leave the model out if it was tuned",
            )


def _has_own_head(scorer: Scorer, reference: ModelReference) -> bool:
    source = scorer.sources.own(reference)
    if HEAD not in source.shapes or EMBEDDINGS not in source.shapes:
        return False
    head, embeddings = (stored(source.weight(name))[:COMPARED_ROWS] for name in (HEAD, EMBEDDINGS))
    return not torch.equal(head, embeddings)


def vectors(scorer: Scorer) -> Findings:
    """Task vectors that are zero, nearly equal or too large for a fine-tune; reads the weights."""
    facts = scorer.geometry
    for model in facts[0].norms:
        largest = max(of.norms[model] for of in facts)
        if largest == 0:
            yield Finding(model, "its layers are those of the base: its genes change nothing", "Leave it out")
        elif scorer.config.genome.base_model and largest > FAR:
            yield Finding(
                model,
                f"its task vector is {largest:.0%} the size of the base",
                f"Check that it was tuned from {scorer.config.genome.base_model}, and not from another model",
            )
    for pair in facts[0].cosines:
        least = min(of.cosines[pair] for of in facts)
        if least > ALIKE:
            yield Finding(
                pair.replace("/", " and "),
                f"they are nearly one model (the cosine of their task vectors is {least:.2f} or more in every slice)",
                "One of them is enough: each doubles the genes of the other",
            )


def most_alike(facts: Sequence[SliceGeometry]) -> list[str]:
    """The pairs of models, the most alike first."""
    return sorted(facts[0].cosines, key=lambda pair: -max(of.cosines[pair] for of in facts))


def routed(scorer: Scorer) -> str:
    """How the routers of a mixture of experts are merged, in a sentence; empty for a dense model."""
    space = scorer.space
    if not (routers := routers_of(scorer.sources[scorer.config.genome.references[0]].shapes, _config(scorer))):
        return ""
    named, kept = ", ".join(routers), [method.name for method in space.genome.methods if space.keeps_routers(method)]
    others = [method.name for method in space.genome.methods if method.name not in kept]
    said = [f"those of the base with {', '.join(kept)} (a filter in genome.filters gives them genes)"] if kept else []
    said += [f"merged like other tensors with {', '.join(others)}"] if others else []
    return f"The routers ({named}) are {' and '.join(said)}."


def _config(scorer: Scorer) -> Mapping[str, Any]:
    return scorer.sources.config(scorer.config.genome.references[0])


def rounding_loss(scorer: Scorer) -> float:
    """The share of what the uniform merge changes that rounding loses; see `Merger.rounding_loss`."""
    return Merger(scorer.sources).rounding_loss(scorer.space.decode(scorer.space.uniform()))


def rounded(lost: float, written: str) -> Findings:
    """A warning where rounding the result to the type `written` loses much of what a merge changes."""
    if lost > LOST:
        yield Finding(
            "rounding",
            f"writing in {written} loses {lost:.0%} of what the uniform merge changes, so most of what the genes tune"
            " is noise",
            "Set genome.dtype: float32",
        )


def licences(scorer: Scorer) -> Findings:
    """Licences of the model cards that may not go together, and cards that name none. It is no legal advice."""
    declared: dict[str, list[str]] = {}
    for reference, name in names(scorer).items():
        for licence in parts(scorer.sources.licence(reference)):
            declared.setdefault(licence or "none", []).append(name)
    for licence, models in declared.items():
        if found := _of_licence(licence, [other for other in declared if other != licence]):
            yield Finding(", ".join(models), *found)


def _of_licence(licence: str, others: list[str]) -> tuple[str, str] | None:
    """The fact and the remedy for one licence next to the others."""
    rest = ", ".join(others)
    known = [other for other in others if other not in ("none", *UNKNOWN)]
    if licence == "none":
        return "no card names a licence", "Check where they come from before you share the result"
    if licence in UNKNOWN:
        return f"its card says {licence!r}", "Check the text of its licence before you share the result"
    if "-nd" in licence:
        return f"{licence} allows no derived works, and a merge may be one", "Check before you share the result"
    if "-nc" in licence:
        mixed = f", next to {rest}" if others else ""
        return f"{licence} forbids commercial use{mixed}", "Check: the result is not for commercial use either"
    if "gpl" in licence or "-sa" in licence:
        if clash := [other for other in known if other not in FREE]:
            more = f"{licence} wants the result under itself alone, and {', '.join(clash)} asks for more"
            return more, "Check whether both can be kept"
        return (f"{licence} wants the result under itself", "Check that the others allow it") if known else None
    if licence in DUTIES and others:
        return DUTIES[licence], f"Check: this holds for the result, next to {rest}"
    return None
