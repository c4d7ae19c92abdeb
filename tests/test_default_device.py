"""Where tensors are made by default is the user's matter: nothing of ours depends on it."""

from __future__ import annotations

import torch
from text_model import GPT
from torch.nn import functional

import gradckpt_dist
from gradckpt_dist.config import EXACT_STORAGES, LOSSY_STORAGES

LAYERS = 4
EXACT = [*EXACT_STORAGES, "offload"]
ALL = [*EXACT, *LOSSY_STORAGES]


def _losses(device: str) -> tuple[list[float], list[int]]:
    """Under masks that move, and under every storage, with tensors made on ``device`` unless it is said where."""
    torch.manual_seed(0)
    model = GPT(vocabulary=16, context=64, width=64, layers=LAYERS, heads=4, dropout=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tokens = torch.randint(16, (4, 64))
    # So small a tolerance that lossy storages are probed, and not chosen.
    config = {"interval": 6, "warmup_steps": 0, "memory_budget": 0.5, "gradient_tolerance": 1e-9, "storages": ALL}
    losses = []

    def train(steps: int) -> None:
        for _ in range(steps):
            loss = functional.cross_entropy(model(tokens), tokens.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

    with torch.device(device):
        engine = gradckpt_dist.enable(model, config)
        train(20)
        engine.load_state_dict(engine.state_dict())
        train(4)
        for name in ALL:
            engine.set_mask([name] * LAYERS)
            train(2)
        stats = engine.stats()
        engine.disable()
    return losses, [stats["epoch"], stats["dropped_samples"]]


def test_training_is_the_same_whatever_the_default_device_is() -> None:
    assert _losses("meta") == _losses("cpu")
