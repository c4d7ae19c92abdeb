"""``derive``: what a cheap operation made of tensors that are saved as well is made again when backward asks for it."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradckpt_dist.errors import StorageError
from gradckpt_dist.storage.base import Forward, Storage
from gradckpt_dist.storage.deferred import DeferredCall, derive
from gradckpt_dist.storage.recipe import CheapOperations
from gradckpt_dist.storage.variant import is_compiled


class Derive(Storage):
    """Holds about what ``selective`` does, without a second run of the block: saved tensor by saved tensor.

    Of a norm, GELU, SiLU, product, quotient, cast or copy only what it was made of is held (``recipe.py``). All else is
    held as ``keep`` holds it, so that a block of other operations, or one on DTensors, saves nothing.

    Raises:
        StorageError: the block is compiled; inside a torch.func transform.
    """

    name = "derive"
    exact = True
    reruns = False

    def __init__(self, block: nn.Module) -> None:
        if is_compiled(block):
            raise StorageError(
                f"{self.name!r} is refused for the compiled {type(block).__name__}, whose operations it cannot see; "
                "use selective there, which has torch.compile's partitioner do the same"
            )
        super().__init__(block)

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call = DeferredCall(self.name, self.account, lossy=False)
        operations = CheapOperations()
        with call.hooks(), operations:
            result = forward(*args, **kwargs)
        places = call.end()
        for key, place in places.items():
            if not place.as_is and place.sample_bytes >= call.least_bytes:
                derive(key, place, places, operations.recipes)
        self.account.slack.end_forward()
        return result
