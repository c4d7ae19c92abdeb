"""Peers are put where they belong, and are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.autograd.graph import saved_tensors_hooks

from gradckpt_dist.bench.frontier.models import Workload
from gradckpt_dist.bench.frontier.peers import PEERS, apply_peer
from gradckpt_dist.bench.frontier.plan import FULL
from gradckpt_dist.bench.frontier.setting import OURS, Setting, Size

SIZE = Size(width=32, context=16, batch=2, layers=5, head_width=16)
EAGER = ["recompute", "every_2", "every_3", "every_4", "pytorch_sac"]


def _with_peer(system: str, model: str = "demo") -> Workload:
    work = Workload(model, SIZE)
    apply_peer(work, Setting(system=system, model=model))
    return work


def _wrapped(work: Workload) -> list[int]:
    return [index for index, block in enumerate(work.blocks) if hasattr(block, "_checkpoint_wrapped_module")]


def _saved_bytes(work: Workload) -> int:
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        work.forward()
    return sum(saved.values())


def test_every_nth_block_is_recomputed() -> None:
    wrapped = {system: _wrapped(_with_peer(system)) for system in ("keep", *EAGER)}
    assert wrapped == {
        "keep": [],
        "recompute": [0, 1, 2, 3, 4],
        "every_2": [0, 2, 4],
        "every_3": [0, 3],
        "every_4": [0, 4],
        "pytorch_sac": [0, 1, 2, 3, 4],
    }


@pytest.mark.parametrize("model", ["demo", "uneven"])
@pytest.mark.parametrize("system", EAGER)
def test_gradients_are_those_of_the_model_and_less_is_held(system: str, model: str) -> None:
    keep, work = Workload(model, SIZE), _with_peer(system, model)
    for one, other in zip(work.gradients(), keep.gradients(), strict=True):
        assert torch.equal(one, other)
        assert one.any()
    assert _saved_bytes(work) < _saved_bytes(keep)


def test_compile_budget_is_set_for_the_process() -> None:
    # Not by monkeypatch: a setting of torch's that is deleted is gone for the tests that follow.
    with functorch_config.patch(activation_memory_budget=1.0):
        apply_peer(Workload("demo", SIZE), Setting(system="compile_budget", model="demo", budget=0.3))
        assert functorch_config.activation_memory_budget == 0.3
    with pytest.raises(ValueError, match="it takes a budget"):
        apply_peer(Workload("demo", SIZE), Setting(system="compile_budget", model="demo"))


def test_the_full_bench_asks_for_every_peer_at_every_tenth() -> None:
    assert FULL.rounds >= 20
    assert FULL.size.width >= 512
    assert [model.model for model in FULL.models] == ["demo", "uneven"]
    for model in FULL.models:
        settings = [model.reference, *model.peers()]
        assert len(set(settings)) == len(settings)
        assert {setting.system for setting in settings} == set(PEERS)
        for system in ("compile_budget", "torchtitan_budget"):
            asked = [(setting.budget, setting.compiled) for setting in settings if setting.system == system]
            assert asked == [(tenth / 10, True) for tenth in range(11)]
        assert model.budgets == tuple(tenth / 10 for tenth in range(11))
        eager = [setting.tolerance for setting in model.ours() if not setting.compiled]
        assert eager == [0.0, 0.01, 0.05]
        assert {setting.system for setting in model.ours()} == {OURS}
        assert any(setting.compiled for setting in model.ours())
