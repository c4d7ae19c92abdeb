from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import run_torchrun

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "launch" / "train_trainer.py"
CONFIG = REPOSITORY / "configs" / "trainer.yaml"

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def test_two_ranks(tmp_path: Path) -> None:
    config = tmp_path / "trainer.yaml"
    config.write_text(CONFIG.read_text().replace("runs/trainer", str(tmp_path)))
    done = run_torchrun(SCRIPT, 2, str(config), "--max-steps", "3", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "step 3: recompute, recompute, recompute, recompute, recompute, recompute" in done.stdout
    start = json.loads((tmp_path / "gradckpt.jsonl").read_text().splitlines()[0])
    assert (start["event"], start["ranks"]) == ("start", 2)
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["GradckptCallback"]["attributes"]["saved"]
    assert saved["blocks"] == [f"model.layers.{index}" for index in range(6)]
    assert saved["step"] == 2


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None or find_spec("peft") is None, reason="DeepSpeed or PEFT is missing")
def test_deepspeed_with_adapters_and_resuming(tmp_path: Path) -> None:
    config, zero = tmp_path / "trainer.yaml", tmp_path / "zero2.json"
    config.write_text(CONFIG.read_text().replace("runs/trainer", str(tmp_path)))
    settings = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    zero.write_text(
        json.dumps(settings | dict.fromkeys(["train_batch_size", "train_micro_batch_size_per_gpu"], "auto"))
    )
    common = [str(config), "--lora", "4", "--deepspeed", str(zero), "--max-steps"]
    for more in (["2"], ["4", "--resume", str(tmp_path / "checkpoint-2")]):
        done = run_torchrun(SCRIPT, 2, *common, *more, CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
        assert done.returncode == 0, done.stderr
        assert f"step {more[0]}: recompute" in done.stdout
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["GradckptCallback"]["attributes"]["saved"]["step"] == 3
