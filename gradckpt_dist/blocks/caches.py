"""Keeping a recomputation from writing into a transformers key-value cache a second time."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from gradckpt_dist.blocks import frameworks
from gradckpt_dist.errors import ConflictError


class CacheGuard:
    """Decides, for one block, what becomes of the caches among a call's arguments.

    A block that will be recomputed runs without them, in the first forward as in the second, as under transformers' own
    checkpointing. Not by means of transformers' own code, since that overlooks a cache given by position (GPT-2), and
    toggling its flags would compile another graph.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._layer_indices = _layer_indices(block)
        self._withheld: weakref.WeakSet[Any] = weakref.WeakSet()
        self._warned = False

    def present(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the block would write into a cache.

        Raises:
            ConflictError: a cache from which this block's states were withheld comes back for a second forward.
        """
        found = False
        for cache in _caches(args, kwargs):
            if cache in self._withheld:
                raise ConflictError(
                    f"{type(self._block).__name__} was recomputed in an earlier forward, hence its states are missing "
                    f"from this {type(cache).__name__}; pass no past_key_values from one training forward to the next "
                    "(use_cache=False), or keep this block"
                )
            found = True
        return found and not getattr(self._block, "_can_checkpoint_with_cache", False)

    def filled(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a cache already holds states that this block must attend to; warns once, if so."""
        if not any(_holds_states(cache, self._layer_indices) for cache in _caches(args, kwargs)):
            return False
        if not self._warned:
            self._warned = True
            warnings.warn(
                "a block that was to be recomputed is kept: its key-value cache already holds states (prefix tuning, "
                "or past_key_values of an earlier forward), which a recomputation would change",
                stacklevel=2,
            )
        return True

    def withheld(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with ``None`` for each cache and ``use_cache`` off; the given ones stay as they are."""
        self._withheld.update(_caches(args, kwargs))
        without = {key: None if frameworks.is_transformers_cache(value) else value for key, value in kwargs.items()}
        if without.get("use_cache"):
            without["use_cache"] = False
        return tuple(None if frameworks.is_transformers_cache(value) else value for value in args), without


def _caches(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        if frameworks.is_transformers_cache(value):
            yield value


def _layer_indices(block: nn.Module) -> frozenset[int]:
    indices = (module.__dict__.get("layer_idx") for module in block.modules())
    return frozenset(index for index in indices if isinstance(index, int))


def _holds_states(cache: Any, layer_indices: frozenset[int]) -> bool:
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if layers is None:
        return True  # of an unknown make: its states may matter
    return any(_layer_holds_states(layers[index]) for index in layer_indices if index < len(layers))


def _layer_holds_states(layer: Any) -> bool:
    previous = getattr(layer, "has_previous_state", False)  # of linear attention: by state, or one for all
    if any(previous.values()) if isinstance(previous, dict) else previous:
        return True
    return hasattr(layer, "get_seq_length") and int(layer.get_seq_length()) > 0
