"""The forms of the answer that servers hold a model to.

Only what OpenAI's strict mode, vLLM (xgrammar, outlines), llama.cpp and Ollama all have: every property is required,
objects are closed, lists have a maximum, nothing is recursive, texts have no maximum. What may be missing is null.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from llmevo.search.prompts.moves import COLUMNS, STEPS
from llmevo.search.prompts.names import Names
from llmevo.search.prompts.question import Question
from llmevo.search.prompts.reading import BELIEFS, DIRECTIONS, HYPOTHESES, KINDS, PURPOSES, SPREADS
from llmevo.search.prompts.table import GeneTable, scale
from llmevo.search.space import METHOD, SPLIT

TASKS = 12  # with a predicted score: those of the largest weights
FEW = 3  # beliefs of the short form


def _bare(schema: dict[str, Any]) -> None:
    """Remove the titles: servers charge for them."""
    for part in (schema, *schema.get("properties", {}).values()):
        part.pop("title", None)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra=_bare)


def _part(name: str, /, **fields: Any) -> Any:
    """A model whose fields are all required; those of names that Python reserves, or any others, by their aliases."""
    given: dict[str, Any] = {f"field_{place}": (of, Field(alias=key)) for place, (key, of) in enumerate(fields.items())}
    return create_model(name, __base__=_Part, **given)


def _list(of: Any, most: int, least: int = 0) -> Any:
    return Annotated[list[of], Field(min_length=least or None, max_length=most)]


def _one_of(*words: str) -> Any:
    return Literal[words]


def answer_model(question: Question, table: GeneTable | None = None) -> type[BaseModel]:
    """Return the pydantic model of the answer: every list is bounded and every integer of a table has its bounds.

    It is the short form where the question wants that, and that of older versions where no slots are known: the
    prompts of older logs ask for it.
    """
    table = table or GeneTable.of(question.space, 0)
    if question.short:
        return short_answer_model(question, table)
    genome = _genome(question, table)
    if not question.slots:
        old = {"reason": str, "kind": _one_of(*KINDS), **genome}
        old |= {"spread": _list(_one_of(*SPREADS), len(table.slices), len(table.slices)), "predicted_score": float}
        return _part("Answer", analysis=str, proposals=_list(_part("Proposal", **old), question.wanted, 1))
    rows = {"rows": _rows(table) | None} if len(table.slices) > 1 else {}
    where = {"model": str, **_parts(question, table), **rows}
    said = {"task": str | None, "direction": _one_of(*DIRECTIONS), "value": float | None, "confidence": float}
    column = _part("Column", column=str, expression=str)
    columns = _list(column, min(COLUMNS, max(1, len(table.columns))), 1)
    # The first keys differ, as OpenAI wants of alternatives.
    moves = (
        _part("Scale", scale=_part("Factor", **where, by=float), **{"from": str}),
        _part("Step", towards=str, **{"from": str}, steps=_list(float, STEPS, 1), **rows),
        _part("Set", set=columns, **{"from": str}, **rows),
    )
    proposal = _part(
        "Proposal",
        reason=str,
        purpose=_one_of(*PURPOSES),
        **{**genome, "genome": genome["genome"] | None},
        depth=columns | None,
        move=moves[0] | moves[1] | moves[2] | None,
        predicted=_predicted(question),
    )
    return _part(
        "Answer",
        analysis=str,
        beliefs=_list(_part("Belief", **where, **said, why=str), BELIEFS),
        proposals=_list(proposal, question.wanted, 1),
        hypotheses=_list(_part("Hypothesis", claim=str, task=str | None, better=str, worse=str), HYPOTHESES),
    )


def short_answer_model(question: Question, table: GeneTable | None = None) -> type[BaseModel]:
    """Return the model of a form for small models: tables with a reason and a predicted score, and a few beliefs."""
    table = table or GeneTable.of(question.space, 0)
    rows = {"rows": _rows(table) | None} if len(table.slices) > 1 else {}
    belief = _part("Belief", model=str, **rows, direction=_one_of(*DIRECTIONS))
    proposal = _part("Proposal", reason=str, **_genome(question, table), predicted_score=float)
    return _part("Answer", proposals=_list(proposal, question.wanted, 1), beliefs=_list(belief, FEW))


def _genome(question: Question, table: GeneTable) -> dict[str, Any]:
    """The merge method, where there are several, and the table."""
    low = min((round(gene.low * scale(gene)) for gene in table.numbers), default=0)
    high = max((round(gene.high * scale(gene)) for gene in table.numbers), default=0)
    integer: Any = Annotated[int, Field(ge=low, le=high)]
    slices, width = len(table.slices), len(table.columns)
    fields: dict[str, Any] = {}
    if table.choices:
        names = Names(question.space, question.tasks, question.mask_names)
        method = _one_of(*(names.methods[name] for name in table.choices[0].choices))
        fields[METHOD] = _list(method, slices, slices) if question.space.genome.method_per_slice else method
    if question.space.genome.split:
        fields[SPLIT] = Annotated[int, Field(ge=1, le=question.space.layers)]
    return {**fields, "genome": _list(_list(integer, width, width), slices, slices)}


def _rows(table: GeneTable) -> Any:
    return _list(Annotated[int, Field(ge=1, le=len(table.slices))], len(table.slices), 1)


def _parts(question: Question, table: GeneTable) -> dict[str, Any]:
    """The filter and the parameter of a statement, where there are several."""
    several = len({gene.parameter for gene in table.numbers}) > 1
    return ({"filter": str | None} if len(question.space.filters) > 1 else {}) | (
        {"parameter": str | None} if several else {}
    )


def _predicted(question: Question) -> Any:
    """The predicted scores: of the total and of the tasks with the largest weights."""
    names = Names(question.space, question.tasks, question.mask_names)
    heaviest = sorted(question.tasks, key=lambda task: -abs(question.tasks[task][0]))[:TASKS]
    tasks = [names.tasks[task] for task in question.tasks if task in heaviest]
    return _part("Predicted", score=float, **{task: float | None for task in tasks if task != "score"})
