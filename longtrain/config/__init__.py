"""Configuration of a run: strict YAML in, frozen dataclasses out."""

from longtrain.config.load import dump_config, load_config
from longtrain.config.nodes import ConfigError, Locations
from longtrain.config.schema import Config

__all__ = ["Config", "ConfigError", "Locations", "dump_config", "load_config"]
