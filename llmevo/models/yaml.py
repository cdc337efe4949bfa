"""YAML that users write, as `yaml.safe_load` reads it, with checks for likely mistakes; the key `on` is a text."""

from typing import Any

import yaml

LARGEST = 100_000
"""The most values of a file, with repetitions by aliases: a few lines of them can stand for billions."""

KINDS = {"timestamp": "a date", "int": "a number", "float": "a number"}


def read_yaml(text: str) -> Any:
    """Return the value of a YAML text with one document.

    Raises ValueError, with the line, for a text that is not YAML, a key that is given twice in a mapping, nesting that
    is too deep or endless, and more than `LARGEST` values.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is None:
            return None
        _check(node, {}, ())
        return yaml.SafeLoader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        if "expected a single document" in str(error):
            raise ValueError("it holds several documents, separated by ---; give one") from error
        raise ValueError(f"it is not YAML: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML: {error}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _check(node: yaml.Node, sizes: dict[yaml.Node, int], above: tuple[yaml.Node, ...]) -> int:
    """Return the number of values in a node, with its aliases. Raises ValueError."""
    if node in sizes:
        return sizes[node]
    if node in above:
        raise ValueError(f"line {_line(node)}: a value contains itself")
    size, above = 1, (*above, node)
    if isinstance(node, yaml.MappingNode):
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:bool" and isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"  # YAML 1.1 takes `on`, `off`, `yes` and `no` for truth values
        _check_keys(node)
        size += sum(_check(part, sizes, above) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(part, sizes, above) for part in node.value)
    elif (kind := KINDS.get(node.tag.rpartition(":")[2])) and isinstance(node, yaml.ScalarNode):
        try:
            yaml.SafeLoader("").construct_object(node)
        except ValueError as error:
            reason = str(error).partition(";")[0]
            raise ValueError(
                f"line {_line(node)}: {node.value[:40]!r} looks like {kind} and is none ({reason}); write it in quotes"
            ) from error
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
