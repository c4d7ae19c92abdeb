"""The peers, each put on a model as its users put it there."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from gradckpt_dist.bench.frontier.models import Workload
from gradckpt_dist.bench.frontier.setting import Setting
from gradckpt_dist.errors import ConfigError

Apply = Callable[[Workload, Setting], None]

BY_BUDGET = ("compile_budget", "torchtitan_budget")
"""Peers that take a fraction, and work on compiled blocks only."""

_aten = torch.ops.aten
SAC_SAVED = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]
"""PyTorch's selective checkpointing as it is usually set up: save matrix products and attention, redo the rest."""


def apply_peer(work: Workload, setting: Setting) -> None:
    """Compile the blocks if that is asked for, and put the peer on them.

    Raises:
        ConfigError: a package that the peer needs is not installed.
    """
    _PEERS[setting.system](work, setting)
    if setting.compiled:
        for block in work.blocks:
            getattr(block, "_checkpoint_wrapped_module", block).compile()


def _keep(work: Workload, setting: Setting) -> None:
    return


def _recompute(work: Workload, setting: Setting) -> None:
    _wrap(work, every=1, wrap=checkpoint_wrapper)


def _every_n(work: Workload, setting: Setting) -> None:
    match = re.fullmatch(r"every_(\d+)", setting.system)
    if match is None:
        raise ValueError(setting.system)
    _wrap(work, every=int(match[1]), wrap=checkpoint_wrapper)


def _pytorch_sac(work: Workload, setting: Setting) -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts, SAC_SAVED)
    _wrap(work, every=1, wrap=functools.partial(checkpoint_wrapper, context_fn=contexts))


def _wrap(work: Workload, *, every: int, wrap: Callable[[nn.Module], nn.Module]) -> None:
    for index in range(0, len(work.blocks), every):
        work.blocks[index] = wrap(work.blocks[index])


def _compile_budget(work: Workload, setting: Setting) -> None:
    if setting.budget is None:
        raise ValueError(f"{setting}: it takes a budget")
    functorch_config.activation_memory_budget = setting.budget


def _torchtitan_full(work: Workload, setting: Setting) -> None:
    policy = _torchtitan().FullAC
    policy(policy.Config()).apply(_Layers(work.blocks))


def _torchtitan_selective(work: Workload, setting: Setting) -> None:
    policy = _torchtitan().SelectiveAC
    policy(policy.Config()).apply(_Layers(work.blocks))


def _torchtitan_budget(work: Workload, setting: Setting) -> None:
    policy = _torchtitan().MemoryBudgetAC
    policy(policy.Config(memory_budget=setting.budget)).apply(_Layers(work.blocks))


class _Layers(nn.Module):
    """torchtitan looks for blocks under ``layers``."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.layers = blocks


def _torchtitan() -> ModuleType:
    try:
        return importlib.import_module("torchtitan.distributed.activation_checkpoint")
    except ImportError as error:
        raise ConfigError(
            f"torchtitan cannot be imported ({error}); install the extra `bench`: pip install 'gradckpt_dist[bench]'"
        ) from None


_PEERS: dict[str, Apply] = {
    "keep": _keep,
    "recompute": _recompute,
    "every_2": _every_n,
    "every_3": _every_n,
    "every_4": _every_n,
    "pytorch_sac": _pytorch_sac,
    "torchtitan_full": _torchtitan_full,
    "torchtitan_selective": _torchtitan_selective,
    "compile_budget": _compile_budget,
    "torchtitan_budget": _torchtitan_budget,
}
PEERS = tuple(_PEERS)
