"""A YAML file as nodes that know their lines, and errors that name them, on one line: `file:line: setting: what is wrong; what to do`."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import yaml
from yaml import MappingNode, Node, ScalarNode

from longtrain.config.schema import Config, field_docs

COMMAND_LINE = "command line"
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


def read_text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}:1", "config", "there is no such file; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}:1", "config", f"byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{file}:1", "config", f"cannot be read ({error.strerror}); give a YAML file you may read") from None


def compose(text: str, setting: str, locate: Callable[[yaml.Mark], str]) -> Node | None:
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


def entries_of(node: MappingNode, prefix: str, known: Sequence[str], where: Locations, lines: dict[str, str]) -> dict[str, Node]:
    """The entries of a mapping by key, each one known and given once; notes their lines under `prefix`."""
    entries: dict[str, Node] = {}
    inherited = where.of(prefix) if prefix else ""
    for key_node, value in node.value:
        here = COMMAND_LINE if inherited == COMMAND_LINE else f"{where.file}:{key_node.start_mark.line + 1}"
        key = key_node.value if isinstance(key_node, ScalarNode) else "(a list or mapping)"
        setting = f"{prefix}.{key}" if prefix else key
        if key not in known:
            raise ConfigError(here, setting, f"is not a setting; {suggestion(key, prefix, known)}")
        if key in entries:
            raise ConfigError(here, setting, f"is given twice, first at {lines[setting]}; keep one of them")
        entries[key] = value
        lines[setting] = here
    return entries


def suggestion(key: str, prefix: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {prefix + '.' if prefix else ''}{close[0]}?"
    return f"the {'settings of ' + prefix if prefix else 'sections'} are {', '.join(known)}"


def section_types(kind) -> list[type]:
    """The dataclass that a section or setting is read into; those of a union, in its order."""
    return [kind] if is_dataclass(kind) else [choice for choice in typing.get_args(kind) if is_dataclass(choice)]


def example_of(setting: str) -> str | None:
    """The example that ends the docstring under a setting's field."""
    found = re.search(r"Example: (.+?)\.?$", _meaning(setting))
    return found and found[1]


def _meaning(setting: str) -> str:
    """The docstring under a setting's field, as a remedy where an error names none."""
    kinds, docs = [Config], {}
    for name in re.sub(r"\[\d+\]", "", setting).split("."):
        docs = {key: doc for kind in kinds for key, doc in field_docs(kind).items()}
        kinds = [inner for kind in kinds for inner in section_types(typing.get_type_hints(kind).get(name))]
    return docs.get(name, f"the sections are {', '.join(f.name for f in fields(Config))}")
