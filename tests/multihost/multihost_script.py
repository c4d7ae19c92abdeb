"""For test_two_hosts: trains under FSDP2 with the plugin and writes this rank's masks to FOLDER."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from frameworks import WIDTH, Model, wrap

import gradckpt_dist


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(3)
    model = wrap(Model(), "fsdp2")
    engine = gradckpt_dist.enable(
        model, {"policy": "threshold", "memory_budget": 0.5, "interval": 4, "warmup_steps": 0}
    )
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    masks = []
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, WIDTH)).square().mean().backward()
        optimizer.step()
        masks.append((engine.mask.epoch, engine.mask.digest))
    state = engine.state_dict()
    assert json.loads(state["window"]) is not None or json.loads(state["totals"]) is not None
    record = {"host": int(os.environ["GROUP_RANK"]), "masks": masks, "saved": state}
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(record))
    engine.disable()
    dist.barrier()
    del model, optimizer
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
