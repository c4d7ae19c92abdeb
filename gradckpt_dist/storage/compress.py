"""``compress8``, ``compress6``, ``compress4``: what backward will need is held in so many bits a value."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradckpt_dist.storage.base import Forward
from gradckpt_dist.storage.choice import Choice, SeenOperations, UnseenOperations
from gradckpt_dist.storage.compiled import is_compiled
from gradckpt_dist.storage.deferred import DeferredCall, Place, derive, least_activation_bytes
from gradckpt_dist.storage.lineage import Lineage, Role
from gradckpt_dist.storage.lossy import Lossy
from gradckpt_dist.storage.noise import NoiseSource
from gradckpt_dist.storage.quantiser import DTYPES
from gradckpt_dist.storage.saved import Account

_ATTENTION_BITS = {8: 8, 6: 6, 4: 8}


class Compress8(Lossy):
    """Quantises each saved activation once, when the block's forward is over, and restores it when backward asks.

    What a cheap operation (a norm, GELU, SiLU, a product, a cast, a copy) has made of tensors that are saved as well is
    not held at all, but made of these again. Until the forward is over the block holds what ``keep`` holds. As they are
    stay: parameters, buffers, what was made of these alone (weights cast by autocast), what is not float32, float16 or
    bfloat16, small and expanded tensors, tensor subclasses but DTensor, statistics, inputs of the block that need no
    gradient and what was made of these alone, and on the CPU tensors with a value that is not finite. Of a DTensor,
    this rank's part is quantised; its placements stay. In a compiled block, where the operations cannot be seen,
    everything else that is saved and large counts as an activation.

    A gradient of the gradient would be wrong without bound: ``create_graph`` and torch.func raise ``StorageError``.
    """

    name = "compress8"
    reruns = False
    bits = 8

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call = CompressedCall(self.name, self.account)
        inputs = tree_leaves((args, kwargs))
        lineage = None if is_compiled(self.block) else Lineage(self.block, inputs)
        with call.hooks(), lineage or nullcontext():
            result = forward(*args, **kwargs)
        choice = SeenOperations(lineage) if lineage is not None else UnseenOperations(self.block, inputs)
        call.seal(choice, self.bits, self.noise)
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
    """One forward of one block.

    Raises:
        StorageError: inside a torch.func transform.
    """

    def __init__(self, name: str, account: Account) -> None:
        super().__init__(name, account, lossy=True)

    def seal(self, choice: Choice, bits: int, noise: NoiseSource) -> None:
        """End of the forward: of what is still saved, hold what ``choice`` says as codes or as what makes it."""
        alive = self.end()
        roles = _roles(list(alive.values()), choice)
        # What is made of others goes first: codes are the more memory while their originals are there.
        coded = {
            place: role
            for key, place in alive.items()
            if (role := roles.get(place)) is not None
            and (role is Role.ATTENDED or not derive(key, place, alive, choice.recipes))
        }
        for place, role in coded.items():
            place.compress(_ATTENTION_BITS[bits] if role is Role.ATTENDED else bits, noise)


def _roles(places: list[Place], choice: Choice) -> dict[Place, Role]:
    """Of those that may be compressed; no sample outlives the call."""
    samples = [place.sample for place in places if place.sample is not None]
    least_bytes = least_activation_bytes(places)
    found = {}
    for place in places:
        sample = place.sample
        if sample is None or place.as_is or not _is_compressible(sample, least_bytes):
            continue
        role = choice.role(sample, samples)
        if role is not None:
            found[place] = role
    return found


def _is_compressible(tensor: Tensor, least_bytes: float) -> bool:
    size_bytes = tensor.untyped_storage().nbytes()
    return tensor.dtype in DTYPES and size_bytes % tensor.itemsize == 0 and size_bytes >= least_bytes
