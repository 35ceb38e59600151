"""Where a run begins: at its first update, or after the last one that a checkpoint holds."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from longtrain.config import Config, Locations
from longtrain.errors import RunError
from longtrain.files import said_plainly
from longtrain.train import checkpoint as on_disk
from longtrain.train import output

MAY_DIFFER = ("output", "checkpoint", "metrics", "spike", "eval")
"""Sections that say nothing of the trajectory."""


def begins_anew(config: Config, where: Locations) -> bool:
    """Whether what stands in `output.dir` is to be replaced, not continued. Raises ConfigError where it must not be replaced.

    An unfinished run is continued, and so is a finished one that now has more steps; `overwrite` replaces a finished one, and lets a run
    go back to a checkpoint of its own.
    """
    directory = Path(config.output.dir)
    if not output.holds_run(directory):
        return True
    ended = output.finished_at(directory)
    known = (directory / output.METRICS).exists() or (directory / output.CHECKPOINTS).exists()
    goes_on = known and config.checkpoint.resume == "auto" and (ended is None or ended < config.train.steps)
    back = _goes_back(config)
    if config.output.overwrite:
        return not back and (not goes_on or ended is not None)
    if back:
        raise where.error(
            "output.dir", f"{directory} would lose what came after {config.checkpoint.resume}; set output.overwrite=true to go back"
        )
    if not goes_on:
        state = "a run" if ended is None else f"a finished run of {ended} steps"
        on = "set checkpoint.resume=auto to go on with it, " if ended is None and known else ""
        raise where.error("output.dir", f"{directory} already holds {state}; {on}name another, or set output.overwrite=true to replace it")
    return False


def _goes_back(config: Config) -> bool:
    """Whether `checkpoint.resume` names something in `output.dir` itself."""
    own = Path(config.output.dir).resolve()
    return config.checkpoint.resume not in ("auto", "never") and Path(config.checkpoint.resume).resolve().is_relative_to(own)


def find_checkpoint(config: Config, where: Locations, anew: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from (None: from the start) and what was done on the way, a sentence each.

    Removes what was half written, and sets damaged checkpoints aside. Raises RunError when there are checkpoints and none is whole.
    """
    own = Path(config.output.dir) / output.CHECKPOINTS
    with said_plainly(own):
        notes = [f"removed half-written {name}" for name in on_disk.remove_partial(own)]
        if anew and own.exists():
            shutil.rmtree(own)
    if config.checkpoint.resume not in ("auto", "never"):
        found = _find_given(Path(config.checkpoint.resume), where)
        later = [c for c in on_disk.list_checkpoints(own) if _goes_back(config) and on_disk.step_of(c) > on_disk.read_facts(found)["step"]]
        for checkpoint in later:
            on_disk.remove(checkpoint)
        return found, notes + [f"removed {c.name}, which came after" for c in later]
    if anew:
        return None, notes
    found, refused = on_disk.newest_whole(own)
    if found is None and refused:
        raise RunError(
            "; ".join(refused.values()) + "; no whole one is left: set checkpoint.resume=never and output.overwrite=true to begin anew"
        )
    with said_plainly(own):
        notes += [f"{problem}; set aside as {on_disk.set_aside(path).name}" for path, problem in refused.items()]
    return found, notes


def _find_given(path: Path, where: Locations) -> Path:
    """`checkpoint.resume: PATH`: that checkpoint, or the newest whole one of that run."""
    if (path / output.CHECKPOINTS).is_dir():
        found, refused = on_disk.newest_whole(path / output.CHECKPOINTS)
        if found is not None:
            return found
        problem = "; ".join(refused.values()) or f"{path} holds no checkpoint"
    else:
        try:
            on_disk.check(path)
            return path
        except on_disk.DamagedCheckpoint as error:
            problem = str(error) if path.exists() else f"there is no {path}"
    raise where.error("checkpoint.resume", f"{problem}; give the path of a whole checkpoint or of a run that has one")


def check_facts(facts: dict, fingerprint, frozen: int, checkpoint: Path, config: Config, where: Locations) -> None:
    """Raise ConfigError unless the run can go on from a checkpoint with these facts; `frozen`: the sum of the weights it does not train."""
    if facts["step"] > config.train.steps:
        raise where.error("train.steps", f"{checkpoint} is at step {facts['step']} already, beyond {config.train.steps}; raise it")
    if facts["data"] != fingerprint:
        raise where.error(
            "data",
            f"{checkpoint} was written while reading other data ({facts['data']} then, {fingerprint} now), and a position there means "
            "nothing here; give it the same data, or begin anew with its weights (longtrain export, then train.init or model.hf)",
        )
    if facts.get("frozen", 0) != frozen:
        raise where.error(
            "model",
            f"{checkpoint} was written beside other frozen weights than the model has now; give it the model it had, or begin anew "
            "elsewhere",
        )


def changed_settings(checkpoint: Path, config: Config) -> list[str]:
    """`train.lr: 0.001 -> 0.0001` for each setting of the trajectory that is not what it was."""
    before = yaml.safe_load((checkpoint / on_disk.CONFIG).read_text(encoding="utf-8"))
    then, now = dict(flat(before)), dict(flat(dataclasses.asdict(config)))
    names = [name for name in then | now if name.split(".")[0] not in MAY_DIFFER]
    return [f"{name}: {then.get(name)} -> {now.get(name)}" for name in names if then.get(name) != now.get(name)]


def flat(value, prefix: str = "") -> Iterator[tuple[str, object]]:
    """`section.key` and value of every setting of a configuration as dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from flat(item, f"{prefix}[{index}]")
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value
