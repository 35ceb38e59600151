"""A model of transformers in a run: built from a directory or a `config.json`, given adapters, and saved as it came.

transformers and peft are extras: they are imported when a configuration asks for them. Every error names its setting.
"""

from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longtrain.config import Config, Locations
from longtrain.config.hf import HfModelConfig, LoraConfig
from longtrain.data.corpus import say_tokenizer
from longtrain.files import said_plainly
from longtrain.nn.replacements.frozen import FrozenLinear, freeze_linears
from longtrain.train.rotary import Rope

RANK, ALPHA = 16, 32.0
CONFIG_FILE, SHARD = "config.json", "5GB"
BASE = "base"
"""Where a saved adapter's own base model stands, if it was drawn at random."""
TOKENIZER_FILES = (
    "tokenizer*", "*vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model", "*.tiktoken",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """A model as it was built, in float32 (of LoRA the frozen weights in the training dtype)."""

    model: nn.Module
    """The transformers model, or the peft model around it."""
    rope: Rope
    notes: tuple[str, ...]
    """What a reader of the run's first lines should know."""


def build(
    settings: HfModelConfig,
    reach: int,
    dtype: torch.dtype,
    where: Locations,
    *,
    read_weights: bool = True,
    change: Callable[[Any], None] | None = None,
) -> Pretrained:
    """Build the model that `model.hf` names for sequences of at most `reach` tokens; where it has no weights, or they are not to be read,
    with random ones by torch's generator. `change` may change its (text) configuration first.

    Raises ConfigError naming what is missing, does not fit or cannot be trained.
    """
    transformers = import_transformers(where)
    source, weights = locate(settings.hf, where)
    read_adapters, read_weights = read_weights, read_weights and weights
    described = load_config(transformers, source, where)
    if change is not None:
        change(described.get_text_config())
    rope = Rope.of(described, reach)
    if settings.rope is not None:
        try:
            rope.put(described, settings.rope)
        except ValueError as error:
            raise where.error("model.rope", str(error)) from None
    dtype = torch.float32 if settings.lora is None else dtype
    notes = [] if weights else [f"{source} names a shape, not weights: random ones, drawn with train.seed"]
    if read_weights:
        model, unread = load_weights(transformers, source, described, dtype, where)
        notes += [f"{len(unread)} tensors of {source} have no place in {type(model).__name__} (such as {unread[0]})"] if unread else []
    else:
        with located(where, f"{source} makes no causal language model"):
            model = transformers.AutoModelForCausalLM.from_config(described, dtype=dtype)
    check_trainable(model, settings, where)
    if settings.quantize is not None:
        try:
            notes.append(f"{freeze_linears(model, settings.quantize)} linear layers are kept in {settings.quantize}")
        except ValueError as error:
            raise where.error("model.quantize", f"{error}; remove it") from None
    if settings.lora is not None:
        model = add_adapters(model, settings.lora, where, read_weights=read_adapters)
    return Pretrained(model=model, rope=rope, notes=tuple(notes))


def import_transformers(where: Locations) -> Any:
    """The library, with longtrain's attention registered. Raises ConfigError with the command that installs it."""
    try:
        import transformers

        import longtrain.hf  # noqa: F401  (it checks the version)
    except ImportError as error:
        raise where.error("model.hf", f"transformers cannot be used ({error}); get it with: pip install longtrain[hf]") from None
    return transformers


def locate(given: str, where: Locations) -> tuple[Path, bool]:
    """The directory, or the `config.json`, that `model.hf` names, and whether there are weights."""
    path = Path(given)
    if path.is_file():
        if path.suffix != ".json":
            raise where.error("model.hf", f"{path} is a file, and no config.json; name the directory of a model, or its config.json")
        return path, False
    if not path.is_dir():
        raise where.error(
            "model.hf", f"there is no {path} (from {Path.cwd()}), and nothing is downloaded; fetch it, then name its directory"
        )
    if not (path / CONFIG_FILE).is_file():
        adapter = (
            " (it is an adapter: name the model it belongs to, and it in model.lora.adapter)"
            if (path / "adapter_config.json").is_file()
            else ""
        )
        raise where.error("model.hf", f"{path} holds no {CONFIG_FILE}{adapter}; name a directory that save_pretrained has written")
    if not any(path.glob("*.safetensors")):
        raise where.error(
            "model.hf",
            f"{path} holds no safetensors; fetch them, or save them again with save_pretrained, or "
            f"write {path / CONFIG_FILE} for random weights",
        )
    return path, True


@contextmanager
def located(where: Locations, what: str) -> Iterator[None]:
    """Whatever is wrong with files of a model, as the configuration's error: transformers has no class for it."""
    try:
        yield
    except ImportError as error:  # of a library for quantised weights; transformers says which, and how it is installed
        raise where.error("model.hf", f"{what} without a library that is not there: {' '.join(str(error).split())}") from error
    except Exception as error:
        raise where.error("model.hf", f"{what} ({type(error).__name__}: {error}); correct its files, or fetch them again") from error


def load_config(transformers: Any, source: Path, where: Locations) -> Any:
    with located(where, f"{source} describes no model that transformers {transformers.__version__} has"):
        return transformers.AutoConfig.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)


def load_weights(transformers: Any, source: Path, described: Any, dtype: torch.dtype, where: Locations) -> tuple[nn.Module, list[str]]:
    """The model with its weights, every one of them read; and the names of tensors that it has no place for."""
    with located(where, f"{source} cannot be loaded"):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            str(source), config=described, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise where.error(
            "model.hf",
            f"{source} lacks {len(missing)} tensors of {type(model).__name__} (such as {missing[0]}), which would begin at random; name a "
            "directory with all of them",
        )
    return model, sorted(found["unexpected_keys"])


def check_trainable(model: nn.Module, settings: HfModelConfig, where: Locations) -> None:
    """Refuse what a run would get wrong: quantised weights, packed rows that are not kept apart, a result that could not be saved."""
    name = type(model).__name__
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None and (settings.lora is None or not quantizer.is_trainable):
        beside = (
            "and cannot be trained beside adapters either"
            if settings.lora
            else "which cannot be trained; add lora: {} to train beside them"
        )
        raise where.error("model.hf", f"its weights are quantised, {beside}; or name the model before quantisation")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise where.error("model.hf", f"{name} takes no position_ids, by which packed documents are kept apart; use a family that does")
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        why = "and the loss that balances experts is not trained here; set it false"
        raise where.error("model.hf", f"its {CONFIG_FILE} says output_router_logits: true, {why}")
    if model.can_generate():
        try:
            model.generation_config.validate(strict=True)
        except ValueError as error:
            raise where.error("model.hf", f"its generation_config.json could not be saved again ({error}); correct it") from None


def add_adapters(model: nn.Module, lora: LoraConfig, where: Locations, *, read_weights: bool = True) -> nn.Module:
    """The peft model around `model`: only its adapters require gradients. `read_weights` of an adapter that is there already."""
    try:
        import peft
    except ImportError as error:
        raise where.error("model.lora", f"peft cannot be used ({error}); get it with: pip install longtrain[lora]") from None
    if lora.adapter is not None:
        return read_adapter(peft, model, Path(lora.adapter), where, read_weights=read_weights)
    chosen = lora.target_modules or "all-linear"
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for index, target in enumerate(() if isinstance(chosen, str) else chosen):
        if not any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules()):
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise where.error(f"model.lora.target_modules[{index}]", f"{target} matches no layer; the linear layers are called {ends}")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=lora.rank or RANK, lora_alpha=lora.alpha or ALPHA, lora_dropout=lora.dropout or 0.0,
        target_modules=chosen if isinstance(chosen, str) else list(chosen),
    )  # fmt: skip
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise where.error("model.lora.target_modules", f"{error}; name linear layers") from None


def read_adapter(peft: Any, model: nn.Module, directory: Path, where: Locations, *, read_weights: bool) -> nn.Module:
    """The peft model of an adapter that was trained before. Raises ConfigError where it is none of this model's, or not LoRA alone."""
    wrong = lambda what: where.error("model.lora.adapter", what)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (directory / file).is_file():
            raise wrong(f"{directory} holds no {file} (from {Path.cwd()}); name a directory that peft or longtrain has saved an adapter in")
    try:
        described = peft.PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError) as error:
        raise wrong(f"{directory} describes no adapter that peft {peft.__version__} has ({error}); correct its files") from None
    if described.peft_type != peft.PeftType.LORA or described.modules_to_save:
        kind = f"modules_to_save: {described.modules_to_save}" if described.peft_type == peft.PeftType.LORA else described.peft_type.value
        raise wrong(f"{directory} is not LoRA alone ({kind}), and only that is trained on here; begin a new adapter")
    described.inference_mode, described.task_type = False, "CAUSAL_LM"
    try:
        adapted = peft.get_peft_model(model, described)
        found = (
            peft.set_peft_model_state_dict(adapted, peft.utils.load_peft_weights(str(directory), device="cpu")) if read_weights else None
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise wrong(f"{directory} does not fit {type(model).__name__} ({error}); name the model it belongs to in model.hf") from None
    lacking = [] if found is None else [*found.unexpected_keys, *(name for name in found.missing_keys if ".lora_" in name)]
    if lacking:
        raise wrong(
            f"{directory} and the model have not the same adapters (such as {lacking[0]}); name the model it belongs to in model.hf"
        )
    return adapted


def save(model: nn.Module, config: Config, directory: Path, shard: str | int = SHARD) -> list[str]:
    """Write what `from_pretrained` reads (of LoRA: the adapter, as peft reads it), with the tokenizer's files; returns the file names.

    `directory` is made, or replaced; it is never there in part.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    with said_plainly(directory):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if config.model.lora is None:
            model.save_pretrained(str(partial), max_shard_size=shard)
        else:
            save_adapter(model, config, partial, directory, shard)
        for file in tokenizer_files(config.model.hf):
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, partial / file.name)
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    return sorted(p.name for p in directory.iterdir())


def save_adapter(model: nn.Module, config: Config, partial: Path, directory: Path, shard: str | int) -> None:
    """The adapter, and its base model where nobody else has that: one drawn at random, or whose rotary positions were changed."""
    given, described = Path(config.model.hf), next(iter(model.peft_config.values()))
    changed = not given.is_dir() or any(stage.rope is not None for stage in config.stages())
    described.base_model_name_or_path = str((directory / BASE if changed else given).resolve())
    model.save_pretrained(str(partial), save_embedding_layers=False)
    if changed:
        adapters = {n for n, _ in model.named_parameters() if ".lora_" in n}
        frozen = {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear)}
        whole = {f"{n}.weight": m.whole_weight().to(m.scale.dtype) for n, m in frozen.items()}
        left = adapters | {f"{n}.scale" for n in frozen}
        base = {
            n.removeprefix("base_model.model.").replace(".base_layer.", "."): whole.get(n, t)
            for n, t in model.state_dict().items()
            if n not in left
        }
        model.get_base_model().save_pretrained(str(partial / BASE), state_dict=base, max_shard_size=shard)


def tokenizer_files(given: str) -> Iterator[Path]:
    """The files of a tokenizer beside the model that `model.hf` names."""
    source = Path(given)
    source = source if source.is_dir() else source.parent
    found = {file for pattern in TOKENIZER_FILES for file in source.glob(pattern)}
    return iter(sorted(found))


def check_tokenizer(given: str, tokenizer: dict, where: Locations) -> None:
    """Raise ConfigError where the data's tokens were made by another tokenizer than the one that stands beside the model."""
    own = next((file for file in tokenizer_files(given) if file.name == "tokenizer.json"), None)
    if own is None:
        return
    expected = hashlib.sha256(own.read_bytes()).hexdigest()
    if tokenizer.get("sha256") != expected:
        raise where.error(
            "data",
            f"its tokens were made by {say_tokenizer(tokenizer)}, and the model reads those of {own} (sha256 {expected[:12]}); "
            f"build it again: longtrain data build ... --tokenizer {own.parent}",
        )
