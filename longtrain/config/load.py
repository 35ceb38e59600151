"""Strict YAML into the dataclasses of `schema`: every setting is known, given once, and what its field's type says.

`nodes.py` has the file as nodes with their lines, and the errors; `values.py` reads nodes as fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import get_type_hints

import yaml
from yaml import MappingNode, Node, ScalarNode

from longtrain.config.nodes import COMMAND_LINE, ConfigError, Locations, compose, entries_of, read_text, section_types, suggestion
from longtrain.config.schema import Config
from longtrain.config.values import Reader, is_null


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, Locations]:
    """Read `path`, apply `section.key=value` overrides in order, check everything. Raises ConfigError."""
    file = str(path)
    lines: dict[str, str] = {}
    where = Locations(file, lines)
    sections = _read_sections(compose(read_text(file), "config", lambda mark: f"{file}:{mark.line + 1}"), where, lines)
    for override in overrides:
        _apply_override(override, sections, lines)
    reader = Reader(where, lines)
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


def _read_sections(root: Node | None, where: Locations, lines: dict[str, str]) -> dict[str, dict[str, Node]]:
    """The keys of each section, refusing unknown and duplicate ones."""
    if root is None:
        raise where.error("config", "the file is empty; write the sections model, data, train and output")
    if not isinstance(root, MappingNode):
        raise where.error("config", "must hold sections such as `model:`; write `section:` and its indented keys")
    names = [section.name for section in fields(Config)]
    sections = {}
    for name, node in entries_of(root, "", names, where, lines).items():
        if not isinstance(node, MappingNode) and not is_null(node):
            raise where.error(name, "must be a section; write its keys indented below it")
        known = list(dict.fromkeys(f.name for kind in section_types(get_type_hints(Config)[name]) for f in fields(kind)))
        sections[name] = entries_of(node, name, known, where, lines) if isinstance(node, MappingNode) else {}
    return sections


def _kind_of(section: str, entries: Mapping[str, Node], where: Locations) -> type:
    """Of a section that can be one of several: the one whose first setting is there, else the first. Its settings exclude the others'."""
    first, *others = section_types(get_type_hints(Config)[section])
    kind = next((k for k in others if fields(k)[0].name in entries), first)
    known = [f.name for f in fields(kind)]
    for name in entries:
        if name not in known:
            said = f"with {section}.{known[0]}" if kind is not first else f"without {section}.{fields(others[0])[0].name}"
            raise where.error(f"{section}.{name}", f"has no meaning {said}; remove it (the settings are then {', '.join(known)})")
    return kind


def _apply_override(override: str, sections: dict[str, dict[str, Node]], lines: dict[str, str]) -> None:
    setting, equals, text = override.partition("=")
    section, _, key = setting.partition(".")
    if not equals or not key:
        raise ConfigError(COMMAND_LINE, override, "is not an override; write section.key=value, such as train.steps=10")
    names = [f.name for f in fields(Config)]
    if section not in names:
        raise ConfigError(COMMAND_LINE, setting, f"{section} is not a section; {suggestion(section, '', names)}")
    known = [f.name for kind in section_types(get_type_hints(Config)[section]) for f in fields(kind)]
    if key not in known:
        raise ConfigError(COMMAND_LINE, setting, f"is not a setting; {suggestion(key, section, known)}")
    if lines.get(setting) == COMMAND_LINE:
        raise ConfigError(COMMAND_LINE, setting, "is given twice; keep one of them")
    node = compose(text, setting, lambda mark: COMMAND_LINE)
    sections.setdefault(section, {})[key] = node if node is not None else ScalarNode("tag:yaml.org,2002:null", "")
    for stale in [line for line in lines if line.startswith(f"{setting}[")]:
        del lines[stale]
    lines[setting] = COMMAND_LINE
