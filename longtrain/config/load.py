"""Strict YAML into the dataclasses of `schema`: every error is one line, `file:line: setting: what is wrong; what to do`.

Works on PyYAML's node tree, which knows line numbers and leaves the reading of scalars to us: a value is read as what its field's
type says, never guessed at (PyYAML would make a string of `1e-5`, a boolean of `no`, and keep the last of two equal keys).
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from pathlib import Path

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from longtrain.config.schema import Config, field_docs

COMMAND_LINE = "command line"
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_NUMBER = re.compile(r"[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_SETTING = re.compile(r"[a-z_]+(\.[a-z_]+(\[\d+\])?)+(?=[\s:,=])|[a-z_]+(?=:)")


class ConfigError(ValueError):
    """A wrong setting: `where: setting: problem; remedy`, on one line. The commands print it and end with exit code 2."""

    def __init__(self, where: str, setting: str, problem: str) -> None:
        super().__init__(" ".join(f"{where}: {setting}: {problem}".split()))


@dataclass(frozen=True, slots=True)
class Locations:
    """Where each setting was written, to be named in errors that only show when the run begins."""

    file: str
    lines: Mapping[str, str]

    def of(self, setting: str) -> str:
        """`file:line` of a setting, or of what encloses it; `command line` for an override."""
        while setting and setting not in self.lines:
            setting = setting.rpartition("[" if setting.endswith("]") else ".")[0]
        return self.lines.get(setting, f"{self.file}:1")

    def error(self, setting: str, problem: str) -> ConfigError:
        return ConfigError(self.of(setting), setting, problem)

    def explain(self, error: ValueError, section: str) -> ConfigError:
        """The ConfigError for a ValueError whose message begins with its setting; else it is about `section`."""
        message = str(error)
        match = _SETTING.match(message)
        if match is None:
            return self.error(section, message)
        setting, problem = match[0], message[match.end() :].lstrip(" :,")
        if ";" not in problem:
            problem += f"; change it: {_meaning(setting)}"
        return self.error(setting, problem)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, Locations]:
    """Read `path`, apply `section.key=value` overrides in order, check everything. Raises ConfigError."""
    file = str(path)
    lines: dict[str, str] = {}
    where = Locations(file, lines)
    sections = _read_sections(_compose(_read_text(file), "config", lambda mark: f"{file}:{mark.line + 1}"), where, lines)
    for override in overrides:
        _apply_override(override, sections, lines)
    reader = _Reader(where, lines)
    values = {}
    for section in fields(Config):
        if section.name in sections or section.default_factory is MISSING:
            entries = sections.get(section.name, {})
            values[section.name] = reader.dataclass(section.name, _kind_of(section.name, entries, where), entries)
    try:
        return Config(**values), where
    except ValueError as error:
        raise where.explain(error, "config") from None


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to an equal configuration: every setting, defaults included."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    return yaml.safe_dump(plain(asdict(config)), sort_keys=False, width=120)


def _read_text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}:1", "config", "there is no such file; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}:1", "config", f"byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{file}:1", "config", f"cannot be read ({error.strerror}); give a YAML file you may read") from None


def _compose(text: str, setting: str, locate: Callable[[yaml.Mark], str]) -> Node | None:
    """The node tree of one YAML document. Raises ConfigError, located by `locate`, for what is not YAML."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        problem = f"{error.problem or error.context} (column {error.problem_mark.column + 1})"
        raise ConfigError(locate(error.problem_mark), setting, f"is not valid YAML: {problem}; correct the syntax") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        problem = f"holds the character #x{error.character:04x}, which YAML does not allow; remove it"
        raise ConfigError(locate(yaml.Mark(setting, 0, line, 0, None, None)), setting, problem) from None


def _read_sections(root: Node | None, where: Locations, lines: dict[str, str]) -> dict[str, dict[str, Node]]:
    """The keys of each section, refusing unknown and duplicate ones."""
    if root is None:
        raise where.error("config", "the file is empty; write the sections model, data, train and output")
    if not isinstance(root, MappingNode):
        raise where.error("config", "must hold sections such as `model:`; write `section:` and its indented keys")
    names = [section.name for section in fields(Config)]
    sections = {}
    for name, node in _entries(root, "", names, where, lines).items():
        if not isinstance(node, MappingNode) and not _is_null(node):
            raise where.error(name, "must be a section; write its keys indented below it")
        known = list(dict.fromkeys(f.name for kind in section_types(_type_hints(Config)[name]) for f in fields(kind)))
        sections[name] = _entries(node, name, known, where, lines) if isinstance(node, MappingNode) else {}
    return sections


def section_types(kind) -> list[type]:
    """The dataclass that a section or setting is read into; those of a union, in its order."""
    return [kind] if is_dataclass(kind) else [choice for choice in typing.get_args(kind) if is_dataclass(choice)]


def _kind_of(section: str, entries: Mapping[str, Node], where: Locations) -> type:
    """Of a section that can be one of several: the one whose first setting is there, else the first. Its settings exclude the others'."""
    first, *others = section_types(_type_hints(Config)[section])
    kind = next((k for k in others if fields(k)[0].name in entries), first)
    known = [f.name for f in fields(kind)]
    for name in entries:
        if name not in known:
            said = f"with {section}.{known[0]}" if kind is not first else f"without {section}.{fields(others[0])[0].name}"
            raise where.error(f"{section}.{name}", f"has no meaning {said}; remove it (the settings are then {', '.join(known)})")
    return kind


def _entries(node: MappingNode, prefix: str, known: Sequence[str], where: Locations, lines: dict[str, str]) -> dict[str, Node]:
    """The entries of a mapping by key, each one known and given once; notes their lines under `prefix`."""
    entries: dict[str, Node] = {}
    inherited = where.of(prefix) if prefix else ""
    for key_node, value in node.value:
        here = COMMAND_LINE if inherited == COMMAND_LINE else f"{where.file}:{key_node.start_mark.line + 1}"
        key = key_node.value if isinstance(key_node, ScalarNode) else "(a list or mapping)"
        setting = f"{prefix}.{key}" if prefix else key
        if key not in known:
            raise ConfigError(here, setting, f"is not a setting; {_suggestion(key, prefix, known)}")
        if key in entries:
            raise ConfigError(here, setting, f"is given twice, first at {lines[setting]}; keep one of them")
        entries[key] = value
        lines[setting] = here
    return entries


def _apply_override(override: str, sections: dict[str, dict[str, Node]], lines: dict[str, str]) -> None:
    setting, equals, text = override.partition("=")
    section, _, key = setting.partition(".")
    if not equals or not key:
        raise ConfigError(COMMAND_LINE, override, "is not an override; write section.key=value, such as train.steps=10")
    names = [f.name for f in fields(Config)]
    if section not in names:
        raise ConfigError(COMMAND_LINE, setting, f"{section} is not a section; {_suggestion(section, '', names)}")
    known = [f.name for kind in section_types(_type_hints(Config)[section]) for f in fields(kind)]
    if key not in known:
        raise ConfigError(COMMAND_LINE, setting, f"is not a setting; {_suggestion(key, section, known)}")
    if lines.get(setting) == COMMAND_LINE:
        raise ConfigError(COMMAND_LINE, setting, "is given twice; keep one of them")
    node = _compose(text, setting, lambda mark: COMMAND_LINE)
    sections.setdefault(section, {})[key] = node if node is not None else ScalarNode("tag:yaml.org,2002:null", "")
    for stale in [line for line in lines if line.startswith(f"{setting}[")]:
        del lines[stale]
    lines[setting] = COMMAND_LINE


def _suggestion(key: str, prefix: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {prefix + '.' if prefix else ''}{close[0]}?"
    return f"the {'settings of ' + prefix if prefix else 'sections'} are {', '.join(known)}"


class _Reader:
    """Reads nodes as the types of the fields they stand for."""

    def __init__(self, where: Locations, lines: dict[str, str]) -> None:
        self.where = where
        self.lines = lines

    def dataclass(self, setting: str, section: type, entries: Mapping[str, Node]):
        hints = _type_hints(section)
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
        if _is_null(node):
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
        return self.dataclass(setting, kind, _entries(node, setting, names, self.where, self.lines))

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
                raise self.where.error(setting, f"{text} is not text to YAML; put it in quotes: '{text}'")
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


def _type_hints(section: type) -> dict[str, typing.Any]:
    return typing.get_type_hints(section)


def _required(f: Field) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _is_null(node: Node) -> bool:
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


def _meaning(setting: str) -> str:
    """The docstring under a setting's field, as a remedy where an error names none."""
    kinds, docs = [Config], {}
    for name in re.sub(r"\[\d+\]", "", setting).split("."):
        docs = {key: doc for kind in kinds for key, doc in field_docs(kind).items()}
        kinds = [inner for kind in kinds for inner in section_types(_type_hints(kind).get(name))]
    return docs.get(name, f"the sections are {', '.join(f.name for f in fields(Config))}")


def _example(kind) -> str:
    return {int: "1024", float: "0.1", str: "runs/first"}.get(kind, "...")
