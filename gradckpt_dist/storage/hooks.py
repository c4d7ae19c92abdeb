"""Hooks that a run of a block on the side must not call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def hooks_withheld(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """``torch.autograd.grad`` would run the tensor hooks that a user has put on parameters."""
    kept = [(hooks, dict(hooks)) for tensor in parameters if (hooks := tensor._backward_hooks)]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, content in kept:
            hooks.update(content)
