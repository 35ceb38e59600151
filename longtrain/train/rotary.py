"""Rotary positions of a transformers model: what its configuration says of them, changed by a run's `rope` settings.

transformers reads them from `config.rope_parameters` when it builds a rotary embedding, so a new setting in the middle of a run (a length
schedule) is put into the configuration, and the rotary embeddings are built again. They have no parameters.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from longtrain.config.hf import RopeConfig

KEPT = ("rope_theta", "partial_rotary_factor", "mrope_section")
"""What a new `rope_type` leaves as the model has it."""
FULL = "full_attention"


@dataclass(frozen=True, slots=True)
class Rope:
    """What a model's own configuration says: `parameters` (None without rotary positions), and the positions it was trained for.

    `reach`: the longest sequence of the run, which a changed configuration will say it is for.
    """

    parameters: dict[str, Any] | None
    positions: int | None
    reach: int

    @classmethod
    def of(cls, described: Any, reach: int) -> Rope:
        """Of a transformers configuration that nothing was put into yet."""
        text = described.get_text_config()
        return cls(copy.deepcopy(getattr(text, "rope_parameters", None)) or None, getattr(text, "max_position_embeddings", None), reach)

    def changed(self, wanted: RopeConfig | None) -> dict[str, Any] | None:
        """`rope_parameters` as `wanted` says. Raises ValueError for a model that has none to change."""
        if wanted is None:
            return copy.deepcopy(self.parameters)
        if self.parameters is None:
            raise ValueError("the model has no rotary positions to change; remove it")
        if not any(isinstance(value, dict) for value in self.parameters.values()):
            return self._changed(self.parameters, wanted)
        if not isinstance(self.parameters.get(FULL), dict):
            raise ValueError(f"the model's rotary settings are for {', '.join(self.parameters)}, none of them {FULL}; remove it")
        return copy.deepcopy(self.parameters) | {FULL: self._changed(self.parameters[FULL], wanted)}

    def _changed(self, own: dict[str, Any], wanted: RopeConfig) -> dict[str, Any]:
        if wanted.rope_type is None:
            return copy.deepcopy(own) | wanted.given()
        kept = {name: own[name] for name in KEPT if own.get(name) is not None}
        changed = kept | wanted.given()
        if wanted.rope_type in ("yarn", "llama3"):
            changed.setdefault("original_max_position_embeddings", own.get("original_max_position_embeddings", self.positions))
        return changed

    def put(self, described: Any, wanted: RopeConfig | None) -> None:
        """Put what `wanted` says into a transformers configuration. Raises ValueError as `changed`."""
        text, parameters = described.get_text_config(), self.changed(wanted)
        if parameters is None:
            return
        text.rope_parameters = parameters
        if self.positions is not None:
            further = wanted is not None and not _dynamic(parameters)  # dynamic ones grow from the original length
            scaled = parameters.get(FULL, parameters)
            meant = round((scaled.get("factor") or 0) * (scaled.get("original_max_position_embeddings") or 0))
            text.max_position_embeddings = max(self.positions, self.reach, meant) if further else self.positions

    def set(self, model: nn.Module, wanted: RopeConfig | None) -> None:
        """Give a live model the positions that `wanted` says. `dynamic` ones, which depend on what was read before, begin anew.

        Raises ValueError where the rotary embeddings cannot be built again.
        """
        parameters, embeddings = self.changed(wanted), rotary_embeddings(model)
        if wanted is not None and not embeddings:
            raise ValueError("the model has no rotary embedding that reads its configuration; remove it")
        other = [found for found in embeddings if found[2].config.rope_parameters != parameters or _dynamic(parameters)]
        self.put(model.config, wanted)
        for parent, name, module in other:
            module.config.rope_parameters = copy.deepcopy(parameters)  # most often the same configuration
            try:
                fresh = type(module)(module.config)
            except TypeError as error:
                raise ValueError(f"{type(module).__name__} cannot be built again ({error}); remove it") from None
            setattr(parent, name, fresh.to(next(module.buffers()).device).train(module.training))


def rotary_embeddings(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of every module that computes rotary positions from its configuration: it keeps inverse frequencies."""

    def keeps(module: nn.Module) -> bool:
        described = getattr(getattr(module, "config", None), "rope_parameters", None)
        return bool(described) and any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))

    return [(parent, name, module) for parent in model.modules() for name, module in parent.named_children() if keeps(module)]


def _dynamic(parameters: dict[str, Any] | None) -> bool:
    parts = [parameters or {}, *(value for value in (parameters or {}).values() if isinstance(value, dict))]
    return any(part.get("rope_type") == "dynamic" for part in parts)
