"""The configuration: frozen, keyword-only, strict.

A field that holds a wrong value raises ``ConfigError`` at construction, whichever way the value came.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml

from gradckpt_dist import config_checks as check
from gradckpt_dist.errors import ConfigError
from gradckpt_dist.mask import STORAGE_NAMES

SECTION = "gradckpt"
EXACT_STORAGES = ("keep", "recompute", "selective", "selective_half", "derive")
"""The exact storages that a mask may use unless ``storages`` says otherwise; ``offload`` has to be asked for."""
LOSSY_STORAGES = ("compress8", "compress6", "compress4", "selective8", "selective6", "selective4")

Complete = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Adds to the keys that a user gave the defaults of the framework in use."""

_T = TypeVar("_T")


def _field(default: Any, checked: check.Check) -> Any:
    return dataclasses.field(default=default, metadata={"check": checked})


class _Checked:
    """Runs each field's check at construction."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, field.metadata["check"](value))
            except check.CheckError as failure:
                name = self._qualified(field.name)
                raise ConfigError(f"{name}: {value!r} is not allowed; give {failure}") from None

    @classmethod
    def _qualified(cls, name: str) -> str:
        return name


def _theta(value: Any) -> float | str:
    if value is None:
        return "auto"
    checked: float | str = check.either(check.number(float("-inf")), check.one_of("auto"))(value)
    return checked


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig(_Checked):
    """Where the ``threshold`` policy puts theta, and what the blocks below it do.

    A block is recomputed if its impact is above theta. ``quantile`` (0..1 of the blocks' impacts) takes the place of
    ``value``; ``auto`` moves theta until the memory budget holds.
    """

    value: float | str = _field("auto", _theta)
    quantile: float | None = _field(None, check.optional(check.number(0, 1)))
    low_impact_storage: str = _field("keep", check.one_of(*(name for name in STORAGE_NAMES if name != "recompute")))

    @classmethod
    def _qualified(cls, name: str) -> str:
        return f"threshold.{name}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantile is not None and self.value != "auto":
            raise ConfigError(
                f"threshold: value {self.value!r} and quantile {self.quantile!r} are both given; give one of them"
            )


def _threshold(value: Any) -> ThresholdConfig:
    if isinstance(value, ThresholdConfig):
        return value
    if isinstance(value, Mapping):
        return _build(ThresholdConfig, value, "threshold")
    raise check.CheckError("a section with the keys value, quantile, low_impact_storage")


def _every_n(value: Any) -> int:
    named = {"none": 0, "full": 1}
    if isinstance(value, str) and value in named:
        return named[value]
    try:
        return int(check.integer(0)(value))
    except check.CheckError as failure:
        raise check.CheckError(f"{failure} (0 for none, 1 for all, n for every n-th block), 'none', 'full'") from None


def _memory_budget(value: Any) -> float | str:
    if value is None or value == "auto":
        return "auto"
    return _share_or_bytes(value, check.number(0, 1), "a fraction from 0 (full recompute) to 1 (keep all), 'auto'")


def _reserve(value: Any) -> float | str:
    return _share_or_bytes(value, check.number(0, 1, high_open=True), "a share of the limit of at least 0 and below 1")


def _share_or_bytes(value: Any, share: check.Check, forms: str) -> float | str:
    try:
        if isinstance(value, str):
            check.byte_count(value)
            return value
        return float(share(value))
    except check.CheckError:
        raise check.CheckError(f"{forms}, or {check.BYTES_FORM}") from None


def _storages(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    return tuple(check.list_of(check.one_of(*STORAGE_NAMES), what="storages")(value))


@dataclass(frozen=True, kw_only=True)
class Config(_Checked):
    """What a user can set; docs/configuration.md explains each key.

    Raises:
        ConfigError: a value of the wrong type or out of range, or keys that contradict each other.
    """

    enabled: bool = _field(True, check.boolean)
    policy: str = _field("budget", check.one_of("budget", "threshold", "static"))
    memory_budget: float | str = _field("auto", _memory_budget)
    gradient_tolerance: float = _field(0.0, check.number(0, 1, high_open=True))
    impact: str = _field("probe", check.one_of("norm", "influence", "probe"))
    interval: int = _field(50, check.integer(2))
    warmup_steps: int = _field(5, check.integer(0))
    storages: tuple[str, ...] = _field(None, _storages)
    threshold: ThresholdConfig = _field(ThresholdConfig(), _threshold)
    every_n: int = _field(1, _every_n)
    blocks: tuple[str, ...] = _field((), check.list_of(check.text, what="module names or globs"))
    log_dir: str | None = _field(None, check.optional(check.text))
    log_level: str = _field("info", check.one_of("warning", "info", "debug"))
    seed: int = _field(0, check.integer(0))
    hysteresis: float = _field(0.05, check.number(0, 1))
    reserve: float | str = _field(0.05, _reserve)
    agreement_timeout_s: float = _field(600.0, check.number(0.01, 864_000))  # to a store, under 1 ms means for ever

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.storages is None:
            exact = EXACT_STORAGES if self.gradient_tolerance == 0 else (*EXACT_STORAGES, *LOSSY_STORAGES)
            object.__setattr__(self, "storages", exact)
        if not {"keep", "recompute"} <= set(self.storages):
            raise ConfigError(f"storages: {list(self.storages)} must hold both 'keep' and 'recompute'")
        low = self.threshold.low_impact_storage
        if low not in self.storages:
            raise ConfigError(
                f"threshold.low_impact_storage: {low!r} is not among storages {list(self.storages)}; add it there"
            )
        lossy = sorted(set(self.storages) & set(LOSSY_STORAGES))
        if lossy and self.gradient_tolerance == 0:
            raise ConfigError(
                f"storages: {', '.join(lossy)} are lossy, which gradient_tolerance 0 forbids; "
                "set gradient_tolerance above 0 or take them out"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], complete: Complete = dict) -> Self:
        """A configuration from the keys of the ``gradckpt`` section.

        Raises:
            ConfigError: an unknown key (the message names the nearest known one), or as the constructor.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"the configuration is a {type(data).__name__}; give a section with keys and values")
        return _build(cls, complete(data), "")

    @classmethod
    def from_file(cls, path: str | Path, complete: Complete = dict) -> Self:
        """A configuration from the ``gradckpt`` section of a YAML or JSON file, as ``section_owners`` finds it.

        Raises:
            ConfigError: the file is not there, cannot be read or parsed, has no such section, or as ``from_dict``.
        """
        path = Path(path)
        owners = section_owners(read_document(path))
        if not owners:
            raise ConfigError(f"{path}: there is no top-level section {SECTION!r}; add one with the plugin's keys")
        if len(owners) > 1:
            raise ConfigError(f"{path}: {SECTION!r} is there twice, at the top and in fsdp_config; leave one of them")
        section = owners[0][SECTION]
        try:
            return cls.from_dict({} if section is None else section, complete)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, such that ``Config.from_dict(config.to_dict()) == config`` and JSON can hold them."""
        plain = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def _build(cls: type[_T], data: Mapping[str, Any], section: str) -> _T:
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            name = f"{section}.{key}" if section else str(key)
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown key {name!r}; did you mean {nearest!r}? Known keys: {', '.join(known)}")
    return cls(**data)


def section_owners(document: Any) -> list[dict[str, Any]]:
    """The mappings of a document that hold our section: the top level; in Accelerate's YAML also ``fsdp_config``."""
    top = document if isinstance(document, dict) else {}
    return [part for part in (top, top.get("fsdp_config")) if isinstance(part, dict) and SECTION in part]


def read_document(path: Path) -> Any:
    """What a YAML or JSON file holds.

    Raises:
        ConfigError: the file is not there, cannot be read or parsed, or has another suffix.
    """
    if path.suffix not in {".yaml", ".yml", ".json"}:
        raise ConfigError(f"{path}: a configuration file ends in .yaml, .yml or .json")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give the path of a YAML or JSON file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # YAML passes on int()'s and date()'s own errors
        language = "JSON" if path.suffix == ".json" else "YAML"
        raise ConfigError(f"{path}: not valid {language}: {' '.join(str(error).split())}") from None
