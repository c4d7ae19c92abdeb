"""What storages hold and how far they put gradients off: with all parameters trained, and with LoRA on a frozen base.

    python tests/lora_figures.py [--steps 300]

A Llama of six layers learns the text of launch/train_trainer.py for so many steps. Then all of it is trained on, or
LoRA adapters of rank 8 alone, for as many as it takes to measure. ``held`` is what autograd holds for backward;
``error`` the relative error of the gradient against ``keep`` (the root mean square over eight batches), all blocks
having that storage. ``chosen`` is the budget policy's mask at a fifth of the memory between full recompute and keeping
all, at tolerance 0.05; of storages that are equally good, noise in the times decides.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))

from text_model import read_text
from train_trainer import CONTEXT, build

import gradckpt_dist

BATCH = 16
STORAGES = ("keep", "recompute", "selective", "compress8", "compress4", "selective8", "selective4")
MEASURED_STEPS = 16
BATCHES = 8
SHORT = {"interval": 4, "warmup_steps": 0}
CHOSEN = {"memory_budget": 0.2, "gradient_tolerance": 0.05, **SHORT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.manual_seed(0)
    text = read_text(None)
    sampler = torch.Generator().manual_seed(0)

    def batch() -> Tensor:
        return text.sample(BATCH, CONTEXT - 1, sampler)

    base = build(text.vocabulary, 0).train()
    loss = _train(base, batch, options.steps, lr=3e-3)
    print(f"{options.steps} steps, loss {loss:.3f}")
    learned = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for kind, rank in (("all parameters", 0), ("LoRA", 8)):
        model = _ready(learned, text.vocabulary, rank)
        _train(model, batch, 50, lr=1e-3)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"\n{kind}: {trained} trained of {sum(p.numel() for p in model.parameters())} parameters")
        print("storage       held MiB   error")
        for storage in STORAGES:
            _, held_bytes, error = _measure(model, batch, _only(storage), MEASURED_STEPS)
            print(f"{storage:12} {held_bytes / 2**20:9.2f}  {error:.1e}")
        mask, held_bytes, error = _measure(model, batch, CHOSEN, 10 * MEASURED_STEPS)
        print(f"{'chosen':12} {held_bytes / 2**20:9.2f}  {error:.1e}  {' '.join(mask)}")


def _ready(learned: dict[str, Tensor], vocabulary: int, rank: int) -> nn.Module:
    """The model that has learned; the base of adapters holds the same weights."""
    torch.manual_seed(1)
    model = build(vocabulary, rank).train()
    inner = model.get_base_model() if rank else model
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in inner.state_dict().items()}
    for name, tensor in learned.items():
        weights[name].copy_(tensor)
    return model


def _train(model: nn.Module, batch: Any, steps: int, lr: float) -> float:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    value = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = batch()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        value = loss.item()
    return value


def _measure(model: nn.Module, batch: Any, config: dict[str, Any], steps: int) -> tuple[tuple[str, ...], int, float]:
    """The mask after so many steps, the bytes held under it, and the root mean square of gradient errors."""
    engine = gradckpt_dist.enable(model, config)
    _train(model, batch, steps, lr=0.0)
    mask, held_bytes = engine.mask.storages, engine.stats()["held_bytes"]
    batches = [batch() for _ in range(BATCHES)]
    ours = [_gradient(model, tokens) for tokens in batches]
    engine.disable()
    plain = [_gradient(model, tokens) for tokens in batches]
    squares = [((one - other).norm() / other.norm()) ** 2 for one, other in zip(ours, plain, strict=True)]
    return mask, held_bytes, float(torch.stack(squares).mean().sqrt())


def _only(storage: str) -> dict[str, Any]:
    """One storage for all blocks: none is above a theta that is the highest impact."""
    common = {"storages": sorted({"keep", "recompute", storage}), "gradient_tolerance": 0.99, **SHORT}
    if storage == "recompute":
        return {"policy": "static", **common}
    return {"policy": "threshold", "threshold": {"quantile": 1.0, "low_impact_storage": storage}, **common}


def _gradient(model: nn.Module, tokens: Tensor) -> Tensor:
    torch.manual_seed(2)
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


if __name__ == "__main__":
    main()
