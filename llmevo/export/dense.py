"""Make one dense model of a mixture of experts."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from llmevo.errors import SourceError, UserError
from llmevo.merging.dense import RouterUse, average, expert_of, uniform, widened
from llmevo.merging.preparation.texts import read_texts
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import check_new
from llmevo.models.architecture import experts_of
from llmevo.models.experts import dense_config
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources

Way = Literal["average", "widen", "uniform", "expert"]
WAYS: tuple[Way, ...] = get_args(Way)


def make_dense(
    mixture: ModelReference | str,
    out: Path | str,
    by: Way = "average",
    *,
    text: Path | str | None = None,
    experts: int | None = None,
    expert: int | None = None,
    device: str | None = None,
    root: Path | str = ".",
    warn: Callable[[str], None] = warnings.warn,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Recipe, RouterUse | None]:
    """Write a mixture as one dense model to `out`, a new folder, as `llmevo dense` does.

    `by` is `average`, the experts of each layer by what its router uses on the texts of the file `text`; `widen`, the
    `experts` most used of each layer (2 by default) with all of their neurons; `uniform`, the plain average; or
    `expert`, the one of the number `expert` (0 by default).
    Return the recipe, which `llmevo merge` carries out as well, and the measured use. Raises SourceError for a model
    that is no mixture or has no dense class, UserError for a file or number that cannot be used, and for one that `by`
    does not use.
    """
    from llmevo.export.merge import merge

    of = mixture if isinstance(mixture, ModelReference) else ModelReference.parse(mixture)
    if by not in WAYS:
        raise UserError(f"--by: {by!r} is none of {', '.join(WAYS)}")
    for option, value, ways in (
        ("--text", text, ("average", "widen")),
        ("--experts", experts, ("widen",)),
        ("--expert", expert, ("expert",)),
    ):
        if value is not None and by not in ways:
            raise UserError(f"{option} {value}: --by {by} does not use it; leave it out, or give --by {ways[0]}")
    experts, expert = 2 if experts is None else experts, expert or 0
    sources = Sources(Path(root))
    config = sources.config(of)
    count = experts_of(config)
    if not count:
        raise SourceError(f"{of}: the model is dense (its config.json names no experts); name a mixture of experts")
    dense_config(config, str(of))  # raises for what has no dense class
    check_new(Path(out))  # before anything is measured
    use = None
    if by in ("average", "widen"):
        if text is None:
            raise UserError(
                f"--by {by} measures which experts the routers use; give --text FILE, texts of the kind to use"
            )
        texts = read_texts(str(text), Path(root), "--text")
        if by == "widen":
            _check_count(experts, count, of)
        from llmevo.run.calibration.router_use import router_use

        use = router_use(of, Path(root), texts, device, say)
    if by == "average" and use:
        recipe = average(of, use)
    elif by == "widen" and use:
        recipe = widened(of, use, experts)
    elif by == "expert":
        recipe = Recipe.of_one(expert_of(of, expert))
    else:
        recipe = uniform(of, count)
    return merge(recipe, out, root=root, warn=warn, say=say), use


def _check_count(count: int, experts: int, mixture: ModelReference) -> None:
    """Raise UserError, before anything is measured, for more experts than there are."""
    if not 1 <= count <= experts:
        raise UserError(f"--experts: {count} of the {experts} experts of {mixture}; give 1 to {experts}")
