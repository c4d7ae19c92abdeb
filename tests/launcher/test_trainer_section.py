"""The Trainer with a ``gradckpt`` section in its DeepSpeed JSON, and nothing of us in its arguments."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from frameworks import assert_bitwise
from support import run_distributed_test, run_torchrun
from trainer_support import BLOCKS, MOVING, SAVED, assert_moved, assert_same, deepspeed_config, join_group, train

from gradckpt_dist.errors import ConfigError
from gradckpt_dist.launcher.script import ModelWatch, _tell_trainer

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

AUTOMATIC = {"memory_budget": None, "threshold": {"value": None}, "policy": "threshold"}


def _write(path: Path, section: dict[str, Any], stage: int = 2) -> str:
    """A file whose other values are ``auto`` where the Trainer fills them in."""
    path.write_text(json.dumps(deepspeed_config(stage) | {"gradckpt": section}))
    return str(path)


def _check(folder: Path) -> None:
    from gradckpt_dist import GradckptCallback

    join_group()
    plain = train(folder / "plain", deepspeed=deepspeed_config(2))
    moving = str(folder / "moving.json")
    callback = GradckptCallback()
    ours = train(folder / "ours", [callback], deepspeed=moving)
    assert_same(ours, plain)
    assert_moved(ours)
    assert callback.engine is not None
    assert callback.engine.config.interval == MOVING["interval"]
    assert callback.engine.config.threshold.value == "auto"

    watch = ModelWatch(None, on_enabled=_tell_trainer)  # as under `run` without --config
    watch.arm()
    unchanged = train(folder / "unchanged", deepspeed=moving)
    assert_same(unchanged, plain)
    assert unchanged.masks == ours.masks

    checkpoint = folder / "unchanged" / f"checkpoint-{SAVED}"
    for name, options in (("with", {"deepspeed": moving}), ("without", {"deepspeed": deepspeed_config(2)})):
        callbacks = [GradckptCallback()] if name == "with" else []
        resumed = train(folder / name, callbacks, resume=checkpoint, **options)
        assert resumed.losses == plain.losses
        assert_bitwise(list(resumed.weights.values()), list(plain.weights.values()))
        assert resumed.masks == (ours.masks[SAVED:] if callbacks else [])

    callback = GradckptCallback()
    train(folder / "automatic", [callback], deepspeed=str(folder / "automatic.json"), max_steps=2)
    assert callback.engine is not None
    assert callback.engine.config.memory_budget == callback.engine.config.threshold.value == "auto"
    with pytest.raises(ConfigError, match=r"wrong\.json: unknown key 'intervall'; did you mean 'interval'"):
        train(folder / "wrong", [GradckptCallback()], deepspeed=str(folder / "wrong.json"))
    with pytest.raises(ValueError, match=r"gradckpt\.memory_budget.*without `auto`"):  # by Accelerate
        train(folder / "auto", [GradckptCallback()], deepspeed=str(folder / "auto.json"))


def test_the_section_is_enough(tmp_path: Path) -> None:
    _write(tmp_path / "moving.json", MOVING | {"threshold": {"value": None}})
    _write(tmp_path / "automatic.json", AUTOMATIC)
    _write(tmp_path / "wrong.json", {"intervall": 3})
    _write(tmp_path / "auto.json", {"memory_budget": "auto"})
    run_distributed_test(_check, 2, tmp_path, timeout_seconds=250)


SCRIPT = """
import gc, sys
import torch.distributed as dist
from trainer_support import train

dist.init_process_group("gloo")
train(sys.argv[1], deepspeed=sys.argv[2])
gc.collect()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_under_run_with_no_change_to_the_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "settings").mkdir()
    log = {"log_dir": str(tmp_path / "log"), "log_level": "debug"}
    path = _write(tmp_path / "settings" / "zero.json", MOVING | log)
    wrong = _write(tmp_path / "settings" / "wrong.json", MOVING | {"intervall": 3})
    environment = {
        "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}",
        "DS_ACCELERATOR": "cpu",
    }
    launched = ["gradckpt_dist", "run", str(script), str(tmp_path / "ours")]
    done = run_torchrun("-m", 2, *launched, path, **environment)
    assert done.returncode == 0, done.stderr
    logs = [(tmp_path / "log" / name).read_text() for name in ("gradckpt.jsonl", "gradckpt.rank1.jsonl")]
    first, second = ([json.loads(line).get("digest") for line in log.splitlines()] for log in logs)
    assert first == second
    assert len(set(first)) >= 2
    state = json.loads((tmp_path / "ours" / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["GradckptCallback"]["attributes"]["saved"]["blocks"] == BLOCKS
    refused = run_torchrun("-m", 2, *launched, wrong, **environment)
    assert refused.returncode != 0
    assert f"ConfigError: {wrong}: unknown key 'intervall'; did you mean 'interval'?" in refused.stderr
