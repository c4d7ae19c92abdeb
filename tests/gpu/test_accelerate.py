"""Accelerate's own FSDP, of one rank, and mixed precision with a loss scale."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support import run_torchrun

SCRIPT = """
import json, sys
import torch
from accelerate import Accelerator
from accelerate_support import fsdp_plugin
from text_model import GPT
from torch.nn import functional
import gradckpt_dist

torch.use_deterministic_algorithms(True)
version, precision = int(sys.argv[1]), sys.argv[2]
accelerator = Accelerator(mixed_precision=precision, fsdp_plugin=fsdp_plugin(version) if version else None)
config = {"interval": 6, "warmup_steps": 1, "memory_budget": 0.4, "storages": ["keep", "recompute", "selective"]}

def train(ours):
    torch.manual_seed(0)
    inner = GPT(vocabulary=64, context=64, width=128, layers=4, heads=4, dropout=0.1)
    model, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=0.1))
    engine = gradckpt_dist.enable(model, config, optimizer=optimizer) if ours else None
    torch.manual_seed(1)
    tokens = torch.randint(64, (4, 64), device=accelerator.device)
    losses, masks = [], []
    for _ in range(24):
        loss = functional.cross_entropy(model(tokens).float(), tokens.flatten())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        masks.append(engine.mask.storages if engine else None)
    if engine is not None:
        engine.disable()
    return torch.stack(losses).tolist(), masks

plain, _ = train(False)
ours, masks = train(True)
print(json.dumps({
    "type": str(accelerator.distributed_type), "device": accelerator.device.type,
    "plain": plain, "ours": ours, "masks": len(set(masks)),
}))
accelerator.end_training()
"""


@pytest.mark.parametrize(("version", "precision"), [(0, "fp16"), (0, "bf16"), (1, "bf16"), (2, "bf16")])
def test_losses_are_bitwise_those_without_it(version: int, precision: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root / "launch"), str(root / "tests"), str(root), os.environ.get("PYTHONPATH", "")])
    done = run_torchrun(script, 1, str(version), precision, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["device"] == "cuda"
    assert ("FSDP" in result["type"]) == (version > 0)
    assert result["ours"] == result["plain"]
    assert result["masks"] >= 2
