"""The JSON schema that servers hold an answer to."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from llmevo.genes import METHOD
from llmevo.prompting.names import Names
from llmevo.prompting.question import Question
from llmevo.prompting.reading import KINDS, SPREADS
from llmevo.prompting.sheet import Sheet, scale


def answer_model(question: Question, sheet: Sheet | None = None) -> type[BaseModel]:
    """The pydantic model of the answer: every list of a fixed length, every integer bounded, nothing besides.

    Every field is required and texts have no longest length: OpenAI's strict mode refuses schemas that differ.
    """
    sheet = sheet or Sheet.of(question.space, 0)
    low = min((round(gene.low * scale(gene)) for gene in sheet.numbers), default=0)
    high = max((round(gene.high * scale(gene)) for gene in sheet.numbers), default=0)
    integer: Any = Annotated[int, Field(ge=low, le=high)]
    slices = len(sheet.slices)
    fields: dict[str, Any] = {"reason": (str, ...), "kind": (Literal[KINDS], ...)}
    if sheet.choices:
        names = Names(question.space, question.tasks, question.mask_names)
        method: Any = Literal[tuple(names.methods[name] for name in sheet.choices[0].choices)]
        per_slice = question.space.genome.method_per_slice
        fields[METHOD] = (_list(method, slices) if per_slice else method, ...)
    fields["genome"] = (_list(_list(integer, len(sheet.columns)), slices), ...)
    fields["spread"] = (_list(Literal[SPREADS], slices), ...)
    fields["predicted_score"] = (float, ...)
    strict = ConfigDict(extra="forbid")
    proposal = create_model("Proposal", __config__=strict, **fields)
    proposals: Any = Annotated[list[proposal], Field(min_length=1, max_length=question.wanted)]
    return create_model("Answer", __config__=strict, analysis=(str, ...), proposals=(proposals, ...))


def _list(of: Any, length: int) -> Any:
    return Annotated[list[of], Field(min_length=length, max_length=length)]
