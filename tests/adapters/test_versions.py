"""What is said of frameworks that are missing, too old or too new."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import gradckpt_dist
from gradckpt_dist import ConfigError
from gradckpt_dist.adapters import versions

pytest.importorskip("transformers.trainer_callback")  # before another version of it is pretended
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate and transformers as real distributions of other versions, found before the real ones."""
    for name, version in {"accelerate": "2.1.0.dev0", "transformers": "4.57.1"}.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    versions.warn_if_untested.cache_clear()
    yield
    versions.warn_if_untested.cache_clear()


def test_missing_framework_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ConfigError) as error:
        versions.require("accelerate")
    assert str(error.value) == "accelerate is not installed; pip install 'gradckpt_dist[accelerate]'"
    with pytest.raises(ConfigError, match=r"^transformers is not installed; .*\[transformers\]'$"):
        gradckpt_dist.GradckptCallback  # noqa: B018


@pytest.mark.usefixtures("installed")
def test_the_trainers_callback_says_so_of_transformers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="gradckpt_dist"):
        gradckpt_dist.GradckptCallback()
    assert [line.partition(" than")[0] for line in caplog.messages] == ["gradckpt: transformers 4.57.1 is older"]


@pytest.mark.usefixtures("installed")
def test_other_versions_are_one_line_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="gradckpt_dist"):
        for _ in range(2):
            versions.require("accelerate")
            versions.require("transformers")
    newer, older = caplog.messages
    assert newer.startswith("gradckpt: accelerate 2.1.0.dev0 is newer than what was tested (1.15.0;")
    assert older.startswith("gradckpt: transformers 4.57.1 is older than what was tested (5.23.0;")
    assert "\n" not in newer + older


def test_tested_versions_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    for framework in versions.FRAMEWORKS:
        assert versions.untested(framework) is None, framework
        versions.require(framework)
    assert caplog.messages == []


def test_table_agrees_with_the_extras_and_with_the_versions_that_tests_run() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    constraints = dict(
        line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for framework, support in versions.FRAMEWORKS.items():
        extra, *_ = map(Requirement, project["optional-dependencies"][framework])
        assert extra.name == framework
        assert {str(part) for part in extra.specifier} == {f">={support.lowest}", f"<{support.below}"}
        assert support.tested == constraints[framework] == versions.installed_version(framework)
        assert support.covers(support.tested)
