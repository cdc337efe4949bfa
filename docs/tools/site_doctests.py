"""A griffe extension: the examples of docstrings, lines after `>>>`, as blocks of code."""

from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Put fences around examples; Markdown would read their brackets as links."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring and ">>>" in obj.docstring.value:
            text, _, example = obj.docstring.value.partition(">>>")
            obj.docstring.value = f"{text}```pycon\n>>>{example}\n```"
