"""Strict configuration: what is refused, in which words, and what survives a round trip."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gradckpt_dist import Config, ConfigError, ThresholdConfig
from gradckpt_dist.config import LOSSY_STORAGES
from gradckpt_dist.mask import STORAGE_NAMES

NOT_NUMBERS = [None, True, "1", [1], {}, math.nan, math.inf, 10**400]

WRONG: list[tuple[str, Any]] = [
    *(("enabled", value) for value in (None, 0, 1, "true", [])),
    *(("policy", value) for value in (None, "greedy", 1, [], "Threshold", "")),
    *(("memory_budget", value) for value in [*NOT_NUMBERS[1:], -0.01, 1.01, "40Gib", "40", "Auto", "0.5", ""]),
    *(("gradient_tolerance", value) for value in [*NOT_NUMBERS, -1e-9, 1, 1.0]),
    *(("impact", value) for value in (None, "gradient", "Norm", 3)),
    *(("interval", value) for value in (None, True, 1, 0, -1, 2.0, "50", math.nan)),
    *(("warmup_steps", value) for value in (None, False, -1, 0.5, "5")),
    *(("storages", value) for value in ("keep", [], ["keep"], ["recompute"], ["keep", "recompute", "zip"], [1])),
    *(("storages", ["keep", "recompute", name]) for name in LOSSY_STORAGES),
    *(("threshold", value) for value in (None, "auto", 0.5, [])),
    *(("every_n", value) for value in (None, True, -1, 1.5, "half", "1")),
    *(("blocks", value) for value in (None, "layers.*", [""], [1], {"a": 1})),
    *(("log_dir", value) for value in (1, "", [])),
    *(("log_level", value) for value in (None, "INFO", 10)),
    *(("seed", value) for value in (None, True, -1, 0.0)),
    *(("hysteresis", value) for value in [*NOT_NUMBERS, -0.1, 1.1]),
    *(("reserve", value) for value in (None, 1, -0.1, "1GB", False)),
    *(("agreement_timeout_s", value) for value in [*NOT_NUMBERS, 0, -1, 1e-4, 1e10, 1e15]),
]

WRONG_THRESHOLD: list[tuple[str, Any]] = [
    *(("value", value) for value in (True, "0.5", "Auto", math.nan, math.inf, [], 10**400)),
    *(("quantile", value) for value in ("0.5", -0.1, 1.1, math.nan, True)),
    *(("low_impact_storage", value) for value in (None, "recompute", "zip", 0)),
]


def _short(value: Any) -> str:
    return str(value)[:16]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=_short)
def test_wrong_value_is_one_line_that_names_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict({key: value})
    message = str(caught.value)
    assert message.startswith(f"{key}: ")
    assert "\n" not in message
    with pytest.raises(ConfigError):
        Config(**{key: value})


def test_null_says_automatic_where_that_is_allowed() -> None:
    """In DeepSpeed's JSON, ``auto`` is a value for Accelerate and transformers to fill in."""
    config = Config.from_dict({"memory_budget": None, "threshold": {"value": None}, "storages": None, "log_dir": None})
    assert config == Config()
    assert (config.memory_budget, config.threshold.value) == ("auto", "auto")


@pytest.mark.parametrize(("key", "value"), WRONG_THRESHOLD, ids=_short)
def test_wrong_value_in_a_section_is_named_with_the_section(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^threshold\.{key}: .* is not allowed; give "):
        Config.from_dict({"threshold": {key: value}})


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("agreement_timeout_s", 0, "at least 0.01 and at most 864000"),
        ("blocks", "layers", "a list of module names or globs"),
        ("enabled", 1, "true or false"),
        ("every_n", "some", "'none', 'full'"),
        ("gradient_tolerance", 1, "at least 0 and less than 1"),
        ("hysteresis", 2, "at most 1"),
        ("interval", 1, "at least 2"),
        ("interval", 2.0, "a whole number"),
        ("interval", True, "a whole number"),
        ("log_dir", "", "a non-empty text"),
        ("log_level", "loud", "'warning' or 'info' or 'debug'"),
        ("memory_budget", -0.1, "a fraction from 0"),
        ("memory_budget", "40GB", "units KiB, MiB, GiB, TiB"),
        ("memory_budget", True, "a fraction from 0"),
        ("policy", "budgt", "'budget' or 'threshold' or 'static'"),
        ("reserve", 1, "a share of the limit of at least 0 and below 1, or bytes"),
        ("storages", "keep", "a list of storages"),
        ("storages", ["zip"], "each 'keep' or 'recompute'"),
        ("storages", ["keep"], "must hold both 'keep' and 'recompute'"),
        ("threshold", 3, "a section with the keys"),
        ("threshold", {"value": "high"}, "a finite number, or 'auto'"),
        ("threshold", {"value": math.inf}, "a finite number"),
        ("threshold", {"quantile": 2}, "at least 0 and at most 1"),
        ("threshold", {"value": 1, "quantile": 0.5}, "give one of them"),
        ("threshold", {"low_impact_storage": "offload"}, "add it there"),
        ("warmup_steps", -1, "at least 0"),
    ],
)
def test_refusal_says_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict({key: value})
    assert str(caught.value).startswith(key)
    assert allowed in str(caught.value)


@pytest.mark.parametrize(
    ("data", "unknown", "nearest"),
    [
        ({"memory_buget": 0.5}, "memory_buget", "memory_budget"),
        ({"warmup": 1}, "warmup", "warmup_steps"),
        ({"threshold": {"quantil": 0.5}}, "threshold.quantil", "quantile"),
        ({"threshold": {"low_impact": "keep"}}, "threshold.low_impact", "low_impact_storage"),
        ({1: 2}, "1", None),
        ({None: 2}, "None", None),
        ({"": 2}, "", None),
    ],
)
def test_unknown_key_names_the_nearest_known_one(data: dict[Any, Any], unknown: str, nearest: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(data)
    assert f"unknown key {unknown!r}; did you mean " in str(caught.value)
    if nearest is not None:
        assert f"did you mean {nearest!r}?" in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "gradckpt", 3, [("interval", 5)]])
def test_anything_but_a_mapping_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match="give a section"):
        Config.from_dict(data)


def test_keys_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"value 0\.5 and quantile 0\.5 are both given"):
        ThresholdConfig(value=0.5, quantile=0.5)
    with pytest.raises(ConfigError, match=r"^threshold\.low_impact_storage: 'offload' is not among storages"):
        Config.from_dict({"threshold": {"low_impact_storage": "offload"}})
    with pytest.raises(ConfigError, match="compress8 are lossy, which gradient_tolerance 0 forbids"):
        Config(storages=("keep", "recompute", "compress8"))
    allowed = Config(storages=("keep", "recompute", "compress8"), gradient_tolerance=0.01)
    assert allowed.storages == ("keep", "recompute", "compress8")


def test_values_are_normalised() -> None:
    config = Config.from_dict(
        {"memory_budget": 1, "every_n": "full", "storages": ["recompute", "keep"], "threshold": {"value": 2}}
    )
    assert (config.memory_budget, type(config.memory_budget)) == (1.0, float)
    assert config.every_n == 1
    assert Config(every_n="none").every_n == 0  # type: ignore[arg-type]
    assert config.storages == ("recompute", "keep")
    assert (config.threshold.value, type(config.threshold.value)) == (2.0, float)
    assert hash(config) == hash(dataclasses.replace(config))


def test_storages_follow_from_the_tolerance() -> None:
    assert set(Config().storages) == {"keep", "recompute", "selective", "selective_half", "derive"}
    assert set(Config(gradient_tolerance=0.01).storages) == set(Config().storages) | set(LOSSY_STORAGES)
    assert Config.from_dict({"memory_budget": None}).memory_budget == "auto"


def test_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().interval = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Config(True)  # type: ignore[call-arg]
    with pytest.raises(ConfigError):
        dataclasses.replace(Config(), interval=1)


def _numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


LOW_IMPACT = tuple(name for name in STORAGE_NAMES if name != "recompute")

CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "enabled": st.booleans(),
        "policy": st.sampled_from(["budget", "threshold", "static"]),
        "memory_budget": st.one_of(_numbers(0, 1), st.sampled_from(["auto", "40GiB", "1.5MiB"])),
        "reserve": st.one_of(_numbers(0, 0.99), st.just("2GiB")),
        "impact": st.sampled_from(["norm", "influence", "probe"]),
        "gradient_tolerance": _numbers(0, 0.99),
        "interval": st.integers(2, 10**6),
        "warmup_steps": st.integers(0, 10**6),
        "threshold": st.one_of(
            st.fixed_dictionaries({}, optional={"value": st.one_of(st.just("auto"), _numbers(-1e300, 1e300))}),
            st.fixed_dictionaries({"quantile": _numbers(0, 1)}, optional={"low_impact_storage": st.just("keep")}),
        ),
        "every_n": st.one_of(st.integers(0, 100), st.sampled_from(["none", "full"])),
        "blocks": st.lists(st.text(min_size=1), max_size=3),
        "log_dir": st.one_of(st.none(), st.text(min_size=1)),
        "log_level": st.sampled_from(["warning", "info", "debug"]),
        "seed": st.integers(0, 2**63),
        "hysteresis": _numbers(0, 1),
        "agreement_timeout_s": _numbers(0.01, 864_000),
    },
)


@given(CONFIGS)
def test_round_trips_through_plain_values_and_json(data: dict[str, Any]) -> None:
    config = Config.from_dict(data)
    plain = config.to_dict()
    assert Config.from_dict(plain) == config
    assert Config.from_dict(json.loads(json.dumps(plain, allow_nan=False))) == config
    assert list(plain) == [field.name for field in dataclasses.fields(Config)]


@settings(max_examples=25)
@given(CONFIGS)
def test_yaml_and_json_files_say_the_same(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    folder = tmp_path_factory.getbasetemp()
    config = Config.from_dict(data)
    (folder / "c.yaml").write_text(yaml.safe_dump({"gradckpt": config.to_dict(), "other": 1}), encoding="utf-8")
    (folder / "c.json").write_text(json.dumps({"gradckpt": config.to_dict(), "other": 1}), encoding="utf-8")
    assert Config.from_file(folder / "c.yaml") == config == Config.from_file(str(folder / "c.json"))


def test_empty_section_gives_the_defaults(tmp_path: Path) -> None:
    for name, text in (("a.yaml", "gradckpt:\n"), ("b.yml", "gradckpt: {}\n"), ("c.json", '{"gradckpt": null}')):
        (tmp_path / name).write_text(text)
        assert Config.from_file(tmp_path / name) == Config()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("c.yaml", b"gradckpt: [1, 2", "not valid YAML"),
        ("c.yaml", b"gradckpt:\n\tinterval: 5\n", "not valid YAML"),
        ("c.yaml", b"gradckpt: {interval: !!python/object:os.system x}", "not valid YAML"),
        ("c.yaml", b"gradckpt: {interval: 2026-13-45}", "not valid YAML"),
        ("c.yaml", b"gradckpt: {interval: !!int five}", "not valid YAML"),
        ("c.yaml", b"gradckpt: {seed: " + b"1" * 5000 + b"}", "not valid YAML"),
        ("c.yaml", b"gradckpt: " + b"[" * 3000, "not valid YAML"),
        ("c.yaml", b"interval: 5\n", "there is no top-level section 'gradckpt'"),
        ("c.yaml", b"", "there is no top-level section 'gradckpt'"),
        ("c.yaml", b"- gradckpt\n", "there is no top-level section 'gradckpt'"),
        ("c.yaml", b"gradckpt: 5\n", "give a section with keys and values"),
        ("c.yaml", b"gradckpt: {interval: fast}\n", "interval: 'fast' is not allowed"),
        ("c.yaml", b"gradckpt: \xff\xfe\n", "cannot be read"),
        ("c.json", b'{"gradckpt": {', "not valid JSON"),
        ("c.json", b"gradckpt: {}", "not valid JSON"),
        ("c.json", b'{"gradckpt": ' + b"[" * 100_000, "not valid JSON"),
        ("c.json", b'{"gradckpt": {"seed": ' + b"1" * 5000 + b"}}", "not valid JSON"),
        ("c.json", b'{"gradckpt": {"memory_budget": NaN}}', "memory_budget: nan is not allowed"),
        ("c.toml", b"[gradckpt]\n", "ends in .yaml, .yml or .json"),
        ("config", b"gradckpt: {}\n", "ends in .yaml, .yml or .json"),
    ],
    ids=_short,
)
def test_file_that_cannot_be_used_is_one_line_that_names_it(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Config.from_file(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: ")
    assert reason in message
    assert "\n" not in message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        Config.from_file(tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        Config.from_file(tmp_path / "folder.yaml")


def test_section_may_be_in_accelerates_fsdp_config_but_not_twice(tmp_path: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text("fsdp_config: {fsdp_version: 2, gradckpt: {interval: 7}}")
    assert Config.from_file(path).interval == 7
    path.write_text("gradckpt: {interval: 7}\nfsdp_config: {gradckpt: {interval: 7}}")
    with pytest.raises(ConfigError, match=r"accelerate\.yaml: 'gradckpt' is there twice"):
        Config.from_file(path)


@pytest.mark.parametrize(
    "text",
    [
        "gradckpt: !!python/object/apply:pathlib.Path.touch [{marker}]",
        "gradckpt:\n  log_dir: !!python/object/apply:os.system ['touch {marker}']",
        "gradckpt:\n  policy: !!python/name:os.system",
        "gradckpt:\n  policy: os.system\n  impact: gradckpt_dist.impact.norm.NormImpact",
        "gradckpt:\n  storages: [keep, recompute, my_package.my_storage]",
        "gradckpt:\n  interval: __import__('os').system('touch {marker}')",
    ],
)
def test_a_file_runs_no_code(text: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "c.yaml").write_text(text.replace("{marker}", str(marker)), encoding="utf-8")
    with pytest.raises(ConfigError):
        Config.from_file(tmp_path / "c.yaml")
    assert not marker.exists()
