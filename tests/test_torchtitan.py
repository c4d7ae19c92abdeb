"""The torchtitan policy, applied where torchtitan applies its own: before blocks are compiled and sharded."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import tyro
from frameworks import assert_bitwise, local
from models import VOCABULARY, WIDTH, Block, backward, batch
from support import run_distributed_test
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.distributed import activation_checkpoint as titan

from gradckpt_dist import ConfigError
from gradckpt_dist.torchtitan import ActivationCheckpointingConfig, GradckptAC

STEPS = 12
SECTION = "{policy: threshold, memory_budget: 0.5, interval: 4, warmup_steps: 0, agreement_timeout_s: 60}"


class Decoder(nn.Module):
    """torchtitan's layout: blocks in a ModuleDict of the name ``layers``."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleDict({str(index): Block() for index in range(4)})
        self.output = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.output(x) + 0  # torch 2.13: FSDP2 warns of a root that returns a view


def _parallelize(config: titan.ActivationCheckpointing.Config | None, compiled: bool) -> tuple[nn.Module, Any]:
    """What torchtitan's parallelize functions do to a model, in their order."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Decoder()
    policy = None if config is None else config.build(dump_folder="")
    if policy is not None:
        policy.apply(model)
    for layer in model.layers.values():
        if compiled:
            layer.compile(backend="aot_eager", fullgraph=True)
        if dist.is_initialized():
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, policy


def _train(model: nn.Module) -> list[float]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(backward(model, batch(2 * step + rank)).item())
        optimizer.step()
    return losses


def _check(path: str) -> None:
    for compiled in (False, True):
        plain, _ = _parallelize(None, compiled)
        model, policy = _parallelize(GradckptAC.Config(file=path), compiled)
        assert policy.engine is None
        assert _train(model) == _train(plain)
        mask = policy.engine.mask
        assert mask.blocks == ("layers.0", "layers.1", "layers.2", "layers.3")
        assert set(mask.storages) == {"keep", "recompute"}
        masks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(masks, (mask.epoch, mask.digest))
        assert len(set(masks)) == 1
        assert list(model.state_dict()) == list(plain.state_dict()) == list(Decoder().state_dict())
        for number, pair in enumerate(((model, plain), (plain, model))):
            _check_checkpoint(*pair, str(Path(path).with_name(f"checkpoint{number}{compiled}")))
        assert _train(model) == _train(plain)
        policy.engine.disable()


def _check_checkpoint(written: nn.Module, read: nn.Module, folder: str) -> None:
    """As torchtitan saves a model and loads it."""
    expected = [local(p).detach().clone() for p in written.parameters()]
    checkpoint.save({"model": get_model_state_dict(written)}, checkpoint_id=folder)
    with torch.no_grad():
        for p in read.parameters():
            p.zero_()
    state = get_model_state_dict(read)
    checkpoint.load({"model": state}, checkpoint_id=folder)
    set_model_state_dict(read, state)
    assert_bitwise([local(p).detach() for p in read.parameters()], expected)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(f"gradckpt: {SECTION}")
    return str(path)


def test_two_ranks_are_bitwise_and_agree(file: str) -> None:
    run_distributed_test(_check, 2, file)


def test_evaluation_comes_first_and_keys_go_over_the_file(file: str) -> None:
    config = GradckptAC.Config(file=file, memory_budget=0.25, gradient_tolerance=0.01, interval=6)
    model, policy = _parallelize(config, compiled=False)
    settings = policy.settings
    assert (settings.policy, settings.memory_budget, settings.interval) == ("threshold", 0.25, 6)
    assert "compress4" in settings.storages
    with torch.no_grad():
        model(batch(0))
    assert policy.engine is None
    model(batch(0))
    assert policy.engine.enabled
    assert len(model._forward_pre_hooks) == 1  # the engine's own
    policy.engine.disable()


def test_switched_off_it_leaves_the_model_alone(tmp_path: Path) -> None:
    (tmp_path / "off.yaml").write_text("gradckpt: {enabled: false}")
    model, policy = _parallelize(GradckptAC.Config(file=str(tmp_path / "off.yaml")), compiled=False)
    _train(model)
    assert policy.engine is None
    assert not model._forward_pre_hooks


def test_what_it_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="debug True"):
        GradckptAC.Config(debug=True).build()
    with pytest.raises(ConfigError, match="determinism_check 'none'"):
        GradckptAC.Config(determinism_check="none").build()
    (tmp_path / "wrong.yaml").write_text("gradckpt: {intervall: 3}")
    with pytest.raises(ConfigError, match=r"wrong\.yaml: unknown key 'intervall'; did you mean 'interval'"):
        GradckptAC.Config(file=str(tmp_path / "wrong.yaml")).build()


def test_missing_torchtitan_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gradckpt_dist.torchtitan")
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ConfigError, match=r"^torchtitan is not installed; pip install 'gradckpt_dist\[torchtitan\]'$"):
        importlib.import_module("gradckpt_dist.torchtitan")


@dataclass
class _Theirs:
    """A trainer's Config whose preset selects us."""

    activation_checkpoint: titan.ActivationCheckpointingConfig = field(
        default_factory=lambda: GradckptAC.Config(memory_budget=0.5)
    )


@dataclass
class _Extended:
    """A trainer's Config with our type: we are a subcommand."""

    activation_checkpoint: ActivationCheckpointingConfig = field(default_factory=titan.SelectiveAC.Config)


def test_selected_on_the_command_line() -> None:
    assert isinstance(tyro.cli(_Extended, args=[]).activation_checkpoint, titan.SelectiveAC.Config)
    budget = ["--activation-checkpoint.memory-budget", "40GiB", "--activation-checkpoint.interval", "7"]
    config = tyro.cli(_Extended, args=["activation_checkpoint:gradckpt", *budget]).activation_checkpoint
    assert isinstance(config, GradckptAC.Config)
    assert (config.memory_budget, config.interval) == ("40GiB", 7)
    assert isinstance(config.build(), GradckptAC)


def test_selected_by_a_preset() -> None:
    """tyro warns, as the type of torchtitan's own field does not name us."""
    with pytest.warns(Warning, match="does not match any type in Union"):
        config = tyro.cli(_Theirs, args=[]).activation_checkpoint
    assert isinstance(config, GradckptAC.Config)
    assert config.memory_budget == 0.5
