"""``derive``: what a cheap operation made of tensors that are saved as well is made again when backward asks for it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradckpt_dist.errors import StorageError
from gradckpt_dist.storage.base import Forward, Storage
from gradckpt_dist.storage.compiled import is_compiled
from gradckpt_dist.storage.deferred import DeferredCall, derive
from gradckpt_dist.storage.recipe import Recipes
from gradckpt_dist.storage.saved import Account

_LEAST_FRACTION = 1 / 32
"""Of the largest storage that was saved: what is smaller is not worth an operation."""


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
    account: Account

    def __init__(self, block: nn.Module) -> None:
        if is_compiled(block):
            raise StorageError(
                f"{self.name!r} is refused for the compiled {type(block).__name__}, whose operations it cannot see; "
                "use selective there, which has torch.compile's partitioner do the same"
            )
        super().__init__(block)
        self.account = Account()

    @property
    def held_bytes(self) -> int:
        """Bytes held now for backward, each storage once, parameters excluded, copies of small ones included."""
        return self.account.held_bytes

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call = DeferredCall(self.name, self.account, lossy=False)
        operations = _Operations()
        with call.hooks(), operations:
            result = forward(*args, **kwargs)
        places = call.end()
        least_bytes = max((place.sample_bytes for place in places.values()), default=0) * _LEAST_FRACTION
        for key, place in places.items():
            if not place.as_is and place.sample_bytes >= least_bytes:
                derive(key, place, places, operations.recipes)
        return result


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entered around a block's forward: notes its cheap operations."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recipes = Recipes()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions inside the block stay compiled."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.recipes.note(func, args, kwargs, result)
        return result
