"""The check at the start of a run: a candidate merged into the engine against the same one exported."""

import tempfile
from pathlib import Path

from llmevo.engines.base import Engine
from llmevo.errors import CandidateError, EngineError, SourceError, UserError
from llmevo.merging.merger import not_finite
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.checkpoints import Sources
from llmevo.models.files import partial_folder


def check_engine(engine: Engine, recipe: Recipe, sources: Sources, seed: int) -> bool:
    """Merge `recipe` into the engine and export it, and compare the two.

    Use it before the first candidate: a wrong merge gives no error, only wrong scores. Writes the model to the
    temporary folder (TMPDIR) and removes it again. False when the recipe cannot be merged, so that there is nothing to
    compare. Raises EngineError when the two differ, and SourceError when that is for
    weights of a model that are not finite.
    """
    try:
        engine.swap(recipe)
    except CandidateError:
        return False
    with partial_folder(Path(tempfile.gettempdir()) / "llmevo-check") as folder:
        try:
            write_model(recipe, sources, folder / "model", seed, trim=False)
        except UserError as error:
            if type(error) is not UserError:  # the recipe or a model is at fault, not the disk
                raise
            raise UserError(
                f"the check of the engine needs room for one model in {folder} ({error}); set TMPDIR to a larger disk,"
                " or leave the check out with engine.self_check: false"
            ) from error
        wrong = engine.differences(folder / "model")
    if wrong and (reason := not_finite(sources, recipe.references)):
        raise SourceError(reason)
    if wrong:
        raise EngineError(
            "the engine does not hold what was merged into it, so no score could be trusted:"
            f" {', '.join([*wrong][:5])} {'differs' if len(wrong) == 1 else 'differ'} from the exported model"
        )
    return True
