"""YAML that users write: as `yaml.safe_load` reads it, but for what is hardly meant."""

from typing import Any

import yaml

LARGEST = 100_000
"""Values of a file, counted as often as its aliases repeat them. A few lines of aliases can stand for billions."""


def read_yaml(text: str) -> Any:
    """The values in a YAML text of one document.

    Raises ValueError, with the line, for what is not YAML, for a key that is given twice in one mapping, for nesting
    that is too deep or endless, and for more than `LARGEST` values.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is None:
            return None
        _check(node, {}, ())
        return yaml.SafeLoader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        if "expected a single document" in str(error):
            raise ValueError("it holds several documents, divided by ---; give one") from error
        raise ValueError(f"it is not YAML: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML: {error}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _check(node: yaml.Node, sizes: dict[yaml.Node, int], above: tuple[yaml.Node, ...]) -> int:
    """How many values a node stands for. Each is looked at once, whatever refers to it. Raises ValueError."""
    if node in sizes:
        return sizes[node]
    if node in above:
        raise ValueError(f"line {_line(node)}: a value contains itself")
    size, above = 1, (*above, node)
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        size += sum(_check(part, sizes, above) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(part, sizes, above) for part in node.value)
    if size > LARGEST:
        raise ValueError(f"line {_line(node)}: with its aliases this is more than {LARGEST:,} values; write fewer")
    sizes[node] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if first := lines.get((key.tag, key.value)):
                raise ValueError(
                    f"line {_line(key)}: the key {key.value[:80]!r} is given twice, the first time in line {first};"
                    " keep one of the two"
                )
            lines[key.tag, key.value] = _line(key)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
