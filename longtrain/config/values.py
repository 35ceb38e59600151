"""What a YAML node says, read as the type of the field that it stands for, never guessed at.

PyYAML would make a string of `1e-5` and a boolean of `no`.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass

from yaml import MappingNode, Node, ScalarNode, SequenceNode

from longtrain.config.nodes import COMMAND_LINE, Locations, entries_of, example_of

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_NUMBER = re.compile(r"[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


class Reader:
    """Reads nodes as the types of the fields they stand for."""

    def __init__(self, where: Locations, lines: dict[str, str]) -> None:
        self.where = where
        self.lines = lines

    def dataclass(self, setting: str, section: type, entries: Mapping[str, Node]):
        hints = typing.get_type_hints(section)
        values = {name: self.value(f"{setting}.{name}", hints[name], node) for name, node in entries.items()}
        for f in fields(section):
            if f.name not in values and _required(f):
                raise self.where.error(f"{setting}.{f.name}", f"is missing; add `{f.name}: {_example(hints[f.name])}`")
        try:
            return section(**values)
        except ValueError as error:
            raise self.where.explain(error, setting) from None

    def value(self, setting: str, kind, node: Node):
        if node.tag.startswith("!") or "python/" in node.tag:
            raise self.where.error(setting, f"carries the tag {node.tag}; write the plain value")
        choices = typing.get_args(kind) if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union else (kind,)
        if is_null(node):
            if type(None) in choices:
                return None
            raise self.where.error(setting, f"has no value; write {_describe(kind)}")
        choices = [choice for choice in choices if choice is not type(None)]
        if isinstance(node, SequenceNode):
            lists = [choice for choice in choices if typing.get_origin(choice) is tuple]
            if lists:
                return self.sequence(setting, lists[0], node)
        elif isinstance(node, MappingNode):
            sections = [choice for choice in choices if is_dataclass(choice)]
            if sections:
                return self.item(setting, sections[0], node)
        elif isinstance(node, ScalarNode):
            scalars = [choice for choice in choices if typing.get_origin(choice) is not tuple and not is_dataclass(choice)]
            if scalars:
                return self.scalar(setting, scalars, node)
        raise self.where.error(setting, f"is {_shape(node)}; write {_describe(kind)}")

    def sequence(self, setting: str, kind, node: SequenceNode) -> tuple:
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(node.value)
        elif len(kinds) != len(node.value):
            raise self.where.error(setting, f"lists {len(node.value)} values; write exactly {len(kinds)}")
        return tuple(
            self.item(f"{setting}[{index}]", item_kind, item)
            for index, (item_kind, item) in enumerate(zip(kinds, node.value, strict=True))
        )

    def item(self, setting: str, kind, node: Node):
        if self.where.of(setting) != COMMAND_LINE:
            self.lines[setting] = f"{self.where.file}:{node.start_mark.line + 1}"
        if not is_dataclass(kind):
            return self.value(setting, kind, node)
        names = [f.name for f in fields(kind)]
        if not isinstance(node, MappingNode):
            raise self.where.error(setting, f"is {_shape(node)}; write {{{', '.join(f'{name}: ...' for name in names)}}}")
        return self.dataclass(setting, kind, entries_of(node, setting, names, self.where, self.lines))

    def scalar(self, setting: str, kinds: Sequence, node: ScalarNode):
        text, quoted, kind = node.value, node.style is not None, kinds[0]
        if typing.get_origin(kind) is typing.Literal:
            choices = typing.get_args(kind)
            if text in choices:
                return text
            close = difflib.get_close_matches(text, choices, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"choose {' or '.join(choices)}"
            raise self.where.error(setting, f"{text!r} is not a choice; {remedy}")
        if kind is str:
            if not quoted and node.tag != "tag:yaml.org,2002:str":
                example = example_of(setting)
                write = f"write text, such as {example}, or" if example else "to mean it,"
                raise self.where.error(setting, f"{text} is not text to YAML; {write} put it in quotes: '{text}'")
            return text
        if quoted:
            raise self.where.error(setting, f"{text!r} is text; write {_describe(kind)} without quotes")
        if kind is bool:
            if text not in ("true", "false"):
                raise self.where.error(setting, f"{text!r} is not true or false; write one of the two")
            return text == "true"
        number = _read_number(text)
        if number is None:
            raise self.where.error(setting, f"{text!r} is not a number; write {_describe(kind)}")
        if not math.isfinite(number):
            raise self.where.error(setting, f"{text} is too large; write {_describe(kind)}")
        if kind is float:
            return float(number)
        if isinstance(number, float):
            whole = f"write {int(number)}" if number.is_integer() else f"write a whole number, such as {max(1, round(number))}"
            raise self.where.error(setting, f"{text} is not written as a whole number; {whole}")
        return number


def _read_number(text: str) -> int | float | None:
    """`16384`, `16_384`, `0.1`, `1e-5`, `1.e-5`: an int only where no point and no exponent is written."""
    if _INTEGER.fullmatch(text):
        return int(text)
    octal = re.fullmatch(r"[-+]?0[0-9_]+", text)  # YAML 1.1 reads 010 as 8
    return float(text) if _NUMBER.fullmatch(text) and not octal else None


def _required(f: Field) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.style is None and node.value in ("", "~", "null")


def _shape(node: Node) -> str:
    if isinstance(node, MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, SequenceNode) else f"one value ({node.value})"


def _describe(kind) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if kind in names:
        return names[kind]
    if is_dataclass(kind):
        return f"{{{', '.join(f'{f.name}: ...' for f in fields(kind))}}}"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if is_dataclass(inner):
            return f"a list of {{{', '.join(f.name for f in fields(inner))}}}"
        return f"a list ({_describe(inner)} each)"
    return " or ".join(_describe(choice) for choice in typing.get_args(kind))


def _example(kind) -> str:
    return {int: "1024", float: "0.1", str: "runs/first"}.get(kind, "...")
