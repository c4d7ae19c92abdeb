"""Importing this package imports no framework that is not used, and patches none that is there."""

from __future__ import annotations

import json
import sys

from support import run_command

UNUSED = """
import json, sys
FRAMEWORKS = {"accelerate", "deepspeed", "transformers", "torchtitan"}

def loaded():
    return sorted({name.partition(".")[0] for name in sys.modules} & FRAMEWORKS)

import gradckpt_dist
imported = loaded()
import torch
from torch import nn
model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
engine = gradckpt_dist.enable(model, {"interval": 2, "warmup_steps": 0})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(5):
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
engine.disable()
print(json.dumps([imported, loaded(), engine.stats()["decisions"]]))
"""

COMPILERS = """
import json, sys
import gradckpt_dist
print(json.dumps([name in sys.modules for name in ("torch", "torch._dynamo", "torch._inductor", "sympy")]))
"""

PATCHED = """
import json, sys
import accelerate, accelerate.utils.fsdp_utils, deepspeed, torch, transformers.modeling_layers
import torch.distributed.fsdp, torch.optim, torch.utils.checkpoint
import torch.distributed.algorithms._checkpoint.checkpoint_wrapper
import torchtitan.distributed.activation_checkpoint
FRAMEWORKS = (
    "accelerate", "deepspeed", "transformers", "torchtitan",
    "torch.nn", "torch.autograd", "torch.optim", "torch.utils.checkpoint", "torch.distributed",
)

def members():
    found = {}
    for name, module in list(sys.modules.items()):
        if any(name == framework or name.startswith(framework + ".") for framework in FRAMEWORKS):
            for key, value in list(vars(module).items()):
                found[name, key] = value
                if isinstance(value, type) and value.__module__ == name:
                    found |= {(name, key, attribute): member for attribute, member in list(vars(value).items())}
    return found

before = members()
import gradckpt_dist
after = members()
changed = [".".join(key) for key, value in before.items() if after.get(key) is not value]
print(json.dumps([len(before), changed]))
"""


def _run(script: str) -> list[object]:
    done = run_command([sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr
    result: list[object] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_no_framework_is_imported_unless_used() -> None:
    imported, after_training, decisions = _run(UNUSED)
    assert imported == after_training == []
    assert decisions == 1


def test_no_compiler_is_imported_until_something_is_compiled() -> None:
    assert _run(COMPILERS) == [True, False, False, False]


def test_no_framework_is_patched_by_an_import() -> None:
    members, changed = _run(PATCHED)
    assert isinstance(members, int)
    assert members > 10_000
    assert changed == []
