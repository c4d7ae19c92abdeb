"""``compress8``, ``compress6``, ``compress4``: what backward will need is held in so many bits a value."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradckpt_dist.storage.base import Forward
from gradckpt_dist.storage.choice import Choice, SeenOperations, UnseenOperations
from gradckpt_dist.storage.deferred import DeferredCall, Place, derive, refuse_transforms
from gradckpt_dist.storage.lineage import Lineage, Role
from gradckpt_dist.storage.lossy import Lossy
from gradckpt_dist.storage.noise import NoiseSource
from gradckpt_dist.storage.quantiser import DTYPES, plain_torch
from gradckpt_dist.storage.recipe import Key
from gradckpt_dist.storage.variant import is_compiled

ATTENTION_BITS = {8: 8, 6: 6, 4: 8}


class Compress8(Lossy):
    """Quantises each saved activation once, when the forward is done with it, and restores it when backward asks.

    What a cheap operation (a norm, GELU, SiLU, a product, a cast, a copy) has made of tensors that are saved as well is
    not held at all, but made of these again. As they are stay: parameters, buffers, what was made of these alone
    (weights cast by autocast), what is not float32, float16 or bfloat16, small and expanded tensors, tensor subclasses
    but DTensor, statistics, inputs of the block that need no gradient and what was made of these alone, and on the CPU
    tensors with a value that is not finite. Of a DTensor, this rank's part is quantised; its placements stay. In a
    compiled block, where the operations cannot be seen, everything else that is saved and large counts as an
    activation, and until its forward is over it holds what ``keep`` holds.

    A gradient of the gradient would be wrong without bound: ``create_graph`` and torch.func raise ``StorageError``.
    """

    name = "compress8"
    reruns = False
    bits = 8

    def __init__(self, block: nn.Module, noise: NoiseSource) -> None:
        super().__init__(block, noise)
        self._modules = tuple(block.modules())

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        refuse_transforms(self.name)
        inputs = tree_leaves((args, kwargs))
        lineage = None if is_compiled(self.block) else Lineage(self._modules, inputs)
        choice = SeenOperations(lineage) if lineage is not None else UnseenOperations(self.block, inputs)
        call = CompressedCall(self, choice)
        with call.hooks(), lineage or nullcontext():
            result = forward(*args, **kwargs)
        call.seal()
        return result


class Compress6(Compress8):
    """The same in 6 bits: a quarter less, for four times the error."""

    name = "compress6"
    bits = 6


class Compress4(Compress8):
    """The same in 4 bits, stochastically rounded; queries, keys and values of attention in 8.

    Attention's backward divides by a saved log-sum-exp that no longer matches them. In a compiled block they are told
    by their shape: [batch, heads, tokens, width] beside a log-sum-exp [batch, heads, tokens].
    """

    name = "compress4"
    bits = 4


class CompressedCall(DeferredCall):
    """One forward of one block under ``storage``, which holds what ``choice`` says as codes or as what makes it.

    ``largest_bytes``: of what the block would save, where it does not save that here.

    Raises:
        StorageError: inside a torch.func transform.
    """

    def __init__(self, storage: Lossy, choice: Choice, *, largest_bytes: int = 0) -> None:
        super().__init__(storage.name, storage.account, lossy=True)
        self._largest_bytes = largest_bytes
        self._choice = choice
        self._bits = storage.bits
        self._noise = storage.noise

    def seal(self) -> int:
        """End of the forward: no tensor that is still saved stays as it is if it may be held otherwise.

        Gives how many of them have been compressed now.
        """
        alive = self.end()
        compressed = self._hold(alive, list(alive.items()))
        self._account.slack.end_forward()
        return compressed

    def before_saving(self) -> None:
        """What the forward is done with need not wait for its end: its peak would be that of ``keep``."""
        idle = self.newly_idle() if self._choice.early else []
        if idle:
            with plain_torch():
                self._hold(self.saved(), idle)

    def _hold(self, saved: dict[Key, Place], settled: list[tuple[Key, Place]]) -> int:
        """Of the places that are ``saved``, hold those that are ``settled``; gives how many as codes."""
        roles = self._roles([place for _, place in settled], saved.values())
        # What is made of others goes first: codes are the more memory while their originals are there.
        coded = {
            place: role
            for key, place in settled
            if (role := roles.get(place)) is not None
            and (role is Role.ATTENDED or not derive(key, place, saved, self._choice.recipes))
        }
        for place, role in coded.items():
            place.compress(ATTENTION_BITS[self._bits] if role is Role.ATTENDED else self._bits, self._noise)
        return len(coded)

    def _roles(self, places: list[Place], saved: Collection[Place]) -> dict[Place, Role]:
        """Of those that may be compressed; no sample outlives the call."""
        found = {}
        for place in places:
            sample = place.sample
            if sample is None or place.as_is or not _is_compressible(sample, self.least_bytes):
                continue
            role = self._choice.role(sample, (other.sample for other in saved if other.sample is not None))
            if role is not None:
                found[place] = role
        return found


def _is_compressible(tensor: Tensor, least_bytes: float) -> bool:
    size_bytes = tensor.untyped_storage().nbytes()
    return tensor.dtype in DTYPES and size_bytes % tensor.itemsize == 0 and size_bytes >= least_bytes
