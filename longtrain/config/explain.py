"""`longtrain config explain KEY`: type, default, meaning and an example of a setting, read from the schema and its docstrings."""

from __future__ import annotations

import difflib
import re
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass

import yaml

from longtrain.config.nodes import COMMAND_LINE, ConfigError
from longtrain.config.schema import Config, field_docs

WIDTH = 100
_EXAMPLE = re.compile(r"\s*Example: (?P<value>.+?)\.?$", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting: `key` as it is written in overrides and errors, list indices left out."""

    key: str
    kind: object
    field: Field
    doc: str

    @property
    def meaning(self) -> str:
        return " ".join(_EXAMPLE.sub("", self.doc).split())

    @property
    def default(self) -> str:
        if self.field.default is MISSING:
            return "none: it must be given" if self.field.default_factory is MISSING else "the defaults of its settings"
        return as_yaml(self.field.default)

    @property
    def example(self) -> str | None:
        """What could stand behind the colon: the docstring's own example, else another choice, else the default."""
        if found := _EXAMPLE.search(self.doc):
            return " ".join(found["value"].split())
        if sections_of(self.kind):
            return None
        choices = [c for kind in alternatives(self.kind) if typing.get_origin(kind) is typing.Literal for c in typing.get_args(kind)]
        others = [choice for choice in choices if choice != self.field.default]
        if others:
            return others[0]
        if bool in alternatives(self.kind):
            return as_yaml(not self.field.default)
        return None if self.field.default in (MISSING, None) else self.default


def run(key: str) -> int:
    """Print a setting, the settings of a section, or, without a key, all of them. Raises ConfigError for an unknown key."""
    settings = {s.key: s for s in all_settings()}
    key = re.sub(r"\[\d*\]", "", key)
    if key and key not in settings:
        raise ConfigError(COMMAND_LINE, key, f"is not a setting; {near(key, list(settings))}")
    if key:
        print(describe(settings[key]))
    inside = [s for name, s in settings.items() if name.startswith(f"{key}." if key else "")]
    if inside and key:
        print()
    for s in inside:
        line = f"{s.key}: {say_type(s.kind)}" + ("" if s.field.default is MISSING else f", {s.default}")
        print(f"{line}\n{textwrap.indent(textwrap.fill(s.meaning, WIDTH - 4), '    ')}" if key else line)
    return 0


def describe(s: Setting) -> str:
    lines = [s.key, f"  type     {say_type(s.kind)}", f"  default  {s.default}"]
    lines.append(textwrap.fill(s.meaning, WIDTH, initial_indent="  meaning  ", subsequent_indent=" " * 11))
    if s.example is not None:
        shown = f"{s.key}={s.example}"
        inside_list = any(s.key.startswith(f"{other.key}.") and is_list(other.kind) for other in all_settings())
        lines.append(f"  example  {s.key.rpartition('.')[2]}: {s.example}" + ("" if inside_list else f"    (command line: '{shown}')"))
    return "\n".join(lines)


def all_settings(section: type = Config, prefix: str = "") -> Iterator[Setting]:
    """Every setting below `section`, sections and entries of lists included, in the order of the schema."""
    hints, docs = typing.get_type_hints(section), field_docs(section)
    for f in fields(section):
        key = f"{prefix}{f.name}"
        yield Setting(key=key, kind=hints[f.name], field=f, doc=docs.get(f.name, ""))
        for inner in sections_of(hints[f.name]):
            yield from all_settings(inner, f"{key}.")


def near(key: str, keys: list[str]) -> str:
    """A remedy for an unknown key: the whole key misspelt, or its last part right and the section wrong."""
    last = key.rpartition(".")[2]
    close = [k for k in keys if k.rpartition(".")[2] == last] + difflib.get_close_matches(key, keys, n=3, cutoff=0.6)
    close += [
        k for k in keys if k.rpartition(".")[2] in difflib.get_close_matches(last, [k.rpartition(".")[2] for k in keys], n=2, cutoff=0.75)
    ]
    if close:
        return f"did you mean {' or '.join(list(dict.fromkeys(close))[:3])}?"
    return f"the sections are {', '.join(k for k in keys if '.' not in k)}; without a key, explain lists every setting"


def alternatives(kind) -> tuple:
    """The members of a union, None left out; a plain type alone."""
    members = typing.get_args(kind) if not isinstance(kind, type) and typing.get_origin(kind) not in (tuple, typing.Literal) else (kind,)
    return tuple(member for member in members if member is not type(None))


def is_list(kind) -> bool:
    return any(typing.get_origin(member) is tuple for member in alternatives(kind))


def sections_of(kind) -> list[type]:
    """The dataclasses that a setting is, or is a list of: several where it can be one of them."""
    inner = [typing.get_args(member)[0] if typing.get_origin(member) is tuple else member for member in alternatives(kind)]
    return [member for member in inner if is_dataclass(member)]


def say_type(kind) -> str:
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    said = []
    for member in alternatives(kind):
        if typing.get_origin(member) is typing.Literal:
            said.append(" | ".join(typing.get_args(member)))
        elif typing.get_origin(member) is tuple:
            entries = typing.get_args(member)
            count = "" if entries[-1] is Ellipsis else f"{len(entries)} "
            said.append(f"list of {count}({say_type(entries[0])})")
        elif is_dataclass(member):
            said.append("section")
        else:
            said.append(names[member])
    if type(None) in typing.get_args(kind):
        said.append("null")
    return " | ".join(said)


def as_yaml(value) -> str:
    """A value as a YAML file writes it, on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()
