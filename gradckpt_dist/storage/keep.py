"""``keep``: autograd as it is."""

from __future__ import annotations

from typing import Any

from gradckpt_dist.storage.base import Forward, Storage


class Keep(Storage):
    """Everything that autograd saves stays in memory."""

    name = "keep"
    exact = True
    reruns = False

    def run(self, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)
