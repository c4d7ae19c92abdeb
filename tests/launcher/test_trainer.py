"""transformers' Trainer with the callback, and without a change to the script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from frameworks import assert_bitwise
from support import run_distributed_test, run_torchrun
from trainer_support import (
    BLOCKS,
    MOVING,
    SAVED,
    Run,
    assert_moved,
    assert_same,
    deepspeed_config,
    join_group,
    llama,
    train,
    with_adapters,
)

import gradckpt_dist
from gradckpt_dist.errors import BlocksNotFoundError, ConfigError, ConflictError
from gradckpt_dist.launcher.script import ModelWatch, _tell_trainer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def _check_ways_in(folder: Path, **options: Any) -> tuple[Run, Run]:
    """With the callback and without a change to the script; the plain run, and that with the callback."""
    from gradckpt_dist.launcher.trainer import GradckptCallback

    plain = train(folder / "plain", **options)
    callback = GradckptCallback(MOVING)
    ours = train(folder / "ours", [callback], **options)
    assert_same(ours, plain)
    assert_moved(ours)
    assert list(callback.engine.mask.blocks) == BLOCKS
    assert not callback.engine.enabled

    watch = ModelWatch(MOVING, on_enabled=_tell_trainer)
    watch.arm()
    unchanged = train(folder / "unchanged", **options)
    assert_same(unchanged, plain)
    assert unchanged.masks == ours.masks
    return plain, ours


def _check_checkpoints(folder: Path, plain: Run, ours: Run, **options: Any) -> None:
    """Every checkpoint serves with the plugin and without, and training goes on as if it had not been stopped."""
    from gradckpt_dist import GradckptCallback

    keys = _saved_keys(folder / "plain" / f"checkpoint-{SAVED}")
    assert any(BLOCKS[-1] in key for key in keys)
    for written in ("plain", "ours", "unchanged"):
        checkpoint = folder / written / f"checkpoint-{SAVED}"
        assert _saved_keys(checkpoint) == keys
        assert written == "plain" or _gathered(checkpoint)["samples"] > 0
        for callbacks in ([], [GradckptCallback(MOVING)]):
            resumed = train(folder / f"{written} {len(callbacks)}", callbacks, resume=checkpoint, **options)
            assert resumed.losses == plain.losses
            assert_bitwise(list(resumed.weights.values()), list(plain.weights.values()))
            if callbacks:
                if written == "plain":
                    assert resumed.masks[0] == len(BLOCKS) * ("recompute",)
                else:
                    assert resumed.masks == ours.masks[SAVED:]
    assert ours.masks[SAVED - 1] != len(BLOCKS) * ("recompute",)


def _saved_keys(checkpoint: Path) -> set[str]:
    """What the weights are called in a checkpoint of the Trainer's; for FSDP, what the optimizer's state is, too."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import FileSystemReader

    if not (sharded := sorted(checkpoint.glob("*_0"))):
        return set(load_file(checkpoint / "model.safetensors"))
    assert [part.name for part in sharded] == ["optimizer_0", "pytorch_model_fsdp_0"]
    return {key for part in sharded for key in FileSystemReader(part).read_metadata().state_dict_metadata}


def _gathered(checkpoint: Path) -> dict[str, Any]:
    """What all ranks had gathered since the last decision, which a rank alone does not know."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["GradckptCallback"]
    window: dict[str, Any] = json.loads(state["attributes"]["saved"]["window"])
    return window


def _check_rank(folder: Path, stages: list[int]) -> None:
    join_group()
    for stage in stages or [None]:
        options = {} if stage is None else {"deepspeed": deepspeed_config(stage)}
        into = folder / str(stage)
        plain, ours = _check_ways_in(into, **options)
        assert plain.wrapper == ("DeepSpeedEngine" if stages else "DistributedDataParallel")
        if stage not in {0, 1}:  # whose checkpoints are of stage 2's kind
            _check_checkpoints(into, plain, ours, **options)


@pytest.fixture
def environment() -> Iterator[None]:
    """The Trainer's libraries set variables."""
    with patch.dict(os.environ):
        yield


@pytest.mark.usefixtures("environment")
def test_one_process(tmp_path: Path) -> None:
    _check_checkpoints(tmp_path, *_check_ways_in(tmp_path))


def test_data_parallel(tmp_path: Path) -> None:
    run_distributed_test(_check_rank, 2, tmp_path, [])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed(tmp_path: Path) -> None:
    run_distributed_test(_check_rank, 2, tmp_path, [0, 1, 2, 3], timeout_seconds=280)


def _check_fully_sharded(folder: Path) -> None:
    join_group()
    both = {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "SHARDED_STATE_DICT",
    }
    for version in (1, 2):
        settings = both | {"version": version} | ({"sync_module_states": False} if version == 1 else {})
        # Accelerate 1.15.0 does not bring AdamW's state back from FSDP1's sharded checkpoints, with us or without.
        optimizer = {"optim": "sgd", "learning_rate": 0.5} if version == 1 else {}
        options = {"fsdp": True, "fsdp_config": settings, **optimizer}
        plain, ours = _check_ways_in(folder / str(version), **options)
        assert plain.wrapper == ("FullyShardedDataParallel" if version == 1 else "FSDPLlamaForCausalLM")
        _check_checkpoints(folder / str(version), plain, ours, **options)


@pytest.mark.slow
def test_fully_sharded(tmp_path: Path) -> None:
    run_distributed_test(_check_fully_sharded, 2, tmp_path, timeout_seconds=280)


@pytest.mark.usefixtures("environment")
def test_a_checkpoint_at_the_end_of_an_epoch_holds_what_was_gathered(tmp_path: Path) -> None:
    from gradckpt_dist import GradckptCallback

    options = {"save_strategy": "epoch", "max_steps": 32}
    ours = train(tmp_path / "ours", [GradckptCallback(MOVING)], **options)
    checkpoint = tmp_path / "ours" / "checkpoint-16"
    assert _gathered(checkpoint)["samples"] > 0
    resumed = train(tmp_path / "resumed", [GradckptCallback(MOVING)], resume=checkpoint, **options)
    assert resumed.losses == ours.losses
    assert resumed.masks == ours.masks[16:]


@pytest.mark.usefixtures("environment")
def test_figures_reach_every_tracker_and_the_history(tmp_path: Path) -> None:
    from gradckpt_dist import GradckptCallback

    run = train(tmp_path, [GradckptCallback(MOVING)])
    *steps, last = run.recorded
    assert [name for name in last if name.startswith("gradckpt/")] == []
    names = ("blocks_keep", "blocks_recompute", "epoch", "decisions", "plugin_seconds")
    assert all({f"gradckpt/{name}" for name in names} <= set(logs) for logs in steps)
    assert [logs["gradckpt/blocks_keep"] for logs in steps] == [mask.count("keep") for mask in run.masks]
    assert steps[-1]["gradckpt/held_bytes"] > 0
    assert "gradckpt/held_bytes" not in steps[0]
    kept = [{k: v for k, v in entry.items() if k.startswith("gradckpt/")} for entry in run.history[:-1]]
    assert kept == [{k: v for k, v in logs.items() if k.startswith("gradckpt/")} for logs in steps]


def _standing_apart(model: Any) -> list[int]:
    """Counts the calls of each layer's MLP, recomputation included."""
    calls = [0] * len(model.model.layers)
    for index, layer in enumerate(model.model.layers):

        def count(*_: Any, index: int = index) -> None:
            calls[index] += 1

        layer.mlp.register_forward_pre_hook(count)
    return calls


@pytest.mark.usefixtures("environment")
def test_checkpointing_and_cache_of_transformers_are_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from gradckpt_dist import GradckptCallback

    options = {"activation_checkpointing": True, "use_cache": True, "max_steps": 2}
    native = llama()
    calls = _standing_apart(native)
    plain = train(tmp_path / "plain", model=native, **options)
    assert calls == [8, 8, 8, 8]
    model = llama()
    calls = _standing_apart(model)
    with caplog.at_level("INFO", logger="gradckpt_dist"):
        ours = train(tmp_path / "ours", [GradckptCallback({"policy": "static", "every_n": 2})], model=model, **options)
    assert calls == [8, 4, 8, 4]
    assert ours.losses == plain.losses
    assert_bitwise(list(ours.weights.values()), list(plain.weights.values()))
    assert "activation_checkpointing of transformers is taken over" in caplog.text


@pytest.mark.usefixtures("environment")
def test_training_again_and_restored_callbacks(tmp_path: Path) -> None:
    """An engine left by a training that broke off is replaced; the Trainer may make the callback anew."""
    from gradckpt_dist import GradckptCallback

    model, callback = llama(), GradckptCallback(MOVING)
    with pytest.raises(RuntimeError, match="broken off"):
        train(tmp_path / "broken", [callback, _break_off()], model=model)
    left = callback.engine
    assert left is not None
    assert left.enabled
    again = train(tmp_path / "again", [callback], model=model)
    assert not left.enabled
    assert len(set(again.masks)) >= 2
    options = {"restore_callback_states_from_checkpoint": True}
    fresh = GradckptCallback({"policy": "static"})
    restored = train(tmp_path / "restored", [fresh], resume=tmp_path / "again" / "checkpoint-8", **options)
    assert fresh.engine is None
    assert restored.masks[0] == again.masks[7]


@pytest.mark.usefixtures("environment")
@pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks
def test_adapters_on_a_frozen_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from gradckpt_dist import GradckptCallback

    plain = train(tmp_path / "plain", model=with_adapters(llama()))
    callback = GradckptCallback(MOVING)
    ours = train(tmp_path / "ours", [callback], model=with_adapters(llama()))
    assert_same(ours, plain)
    assert len(set(ours.masks)) >= 2
    assert callback.engine is not None
    assert [name.removeprefix("base_model.model.") for name in callback.engine.mask.blocks] == BLOCKS
    checkpoint = tmp_path / "ours" / f"checkpoint-{SAVED}"
    saved = [load_file(run / "adapter_model.safetensors") for run in (checkpoint, tmp_path / "plain" / checkpoint.name)]
    assert list(saved[0]) == list(saved[1])
    resumed = train(tmp_path / "resumed", resume=checkpoint, model=with_adapters(llama()))
    assert resumed.losses == plain.losses


def _break_off() -> Any:
    from transformers import TrainerCallback

    class BreakOff(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("broken off")

    return BreakOff()


@pytest.mark.usefixtures("environment")
def test_a_checkpoint_of_other_blocks_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from gradckpt_dist import GradckptCallback

    train(tmp_path / "all", [GradckptCallback(MOVING)])
    some = GradckptCallback(MOVING | {"blocks": BLOCKS[:2]})
    resumed = train(tmp_path / "some", [some], resume=tmp_path / "all" / "checkpoint-8")
    assert resumed.masks[0] == ("recompute", "recompute")
    assert "the state in the checkpoint is left out" in caplog.text


@pytest.mark.usefixtures("environment")
@pytest.mark.filterwarnings("ignore:Using .torch.compile.module.. when there are global hooks:UserWarning")
def test_what_cannot_be_is_said_in_the_first_step(tmp_path: Path) -> None:
    from gradckpt_dist import GradckptCallback

    with pytest.raises(ConfigError, match=r"wrong\.yaml: unknown key 'intervall'; did you mean 'interval'"):
        (tmp_path / "wrong.yaml").write_text("gradckpt: {intervall: 3}")
        GradckptCallback(tmp_path / "wrong.yaml")
    with pytest.raises(BlocksNotFoundError, match="'nowhere' matches no module of LlamaForCausalLM"):
        train(tmp_path, [GradckptCallback({"blocks": ["nowhere"]})])
    with pytest.raises(ConflictError, match=r"the whole model is compiled.*block\.compile\(\)"):
        train(tmp_path, [GradckptCallback()], torch_compile=True, torch_compile_backend="eager")
    model = llama()
    engine = gradckpt_dist.enable(model, MOVING)
    with pytest.raises(ConflictError, match="enabled on this LlamaForCausalLM already; leave out"):
        train(tmp_path, [GradckptCallback()], model=model)
    engine.disable()


@pytest.mark.usefixtures("environment")
def test_under_run_the_callback_of_the_script_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from gradckpt_dist import GradckptCallback

    watch = ModelWatch(MOVING, on_enabled=_tell_trainer)
    watch.arm()
    callback = GradckptCallback({"policy": "static", "every_n": 2})
    with caplog.at_level("INFO", logger="gradckpt_dist"):
        train(tmp_path, [callback], max_steps=1)
    assert watch.engine is None
    assert callback.engine is not None
    assert callback.engine.mask.storages == ("recompute", "keep", "recompute", "keep")
    assert "its own call counts" in caplog.text


def test_the_package_imports_no_transformers() -> None:
    script = (
        "import sys, gradckpt_dist\n"
        "from gradckpt_dist import *\n"
        "print([name for name in ('transformers', 'accelerate') if name in sys.modules])\n"
        "gradckpt_dist.GradckptCallback\n"
        "print('transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\nTrue\n"


SCRIPT = """
import gc, json, sys
import torch.distributed as dist
from trainer_support import train

run = train(sys.argv[1])
if dist.get_rank() == 0:
    print(json.dumps(run.losses))
gc.collect()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_script_that_knows_nothing_on_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    log = {"log_dir": str(tmp_path / "log"), "log_level": "debug"}
    (tmp_path / "config.json").write_text(json.dumps({"gradckpt": MOVING | log}))
    path = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    launched = ["-m", "gradckpt_dist", "run", "--config", str(tmp_path / "config.json"), str(script)]
    plain = run_torchrun(script, 2, str(tmp_path / "plain"), PYTHONPATH=path)
    ours = run_torchrun(launched[0], 2, *launched[1:], str(tmp_path / "ours"), PYTHONPATH=path)
    assert plain.returncode == 0, plain.stderr
    assert ours.returncode == 0, ours.stderr
    assert _last_line(ours.stdout) == _last_line(plain.stdout)
    logs = [(tmp_path / "log" / name).read_text() for name in ("gradckpt.jsonl", "gradckpt.rank1.jsonl")]
    first, second = ([json.loads(line) for line in log.splitlines()] for log in logs)
    assert [event.get("digest") for event in first] == [event.get("digest") for event in second]
    assert len({event.get("digest") for event in first}) >= 2
    state = json.loads((tmp_path / "ours" / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["GradckptCallback"]["attributes"]["saved"]["blocks"] == BLOCKS
    assert "gradckpt/blocks_keep" in state["log_history"][-1]


def _last_line(output: str) -> list[float]:
    losses = json.loads(output.splitlines()[-1])
    assert len(losses) == 12
    return losses
