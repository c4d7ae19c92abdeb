"""A block's call run again in its own backward, beside the true one, without a trace."""

from __future__ import annotations

import contextlib
import enum
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from gradckpt_dist.cost.allocations import Allocations
from gradckpt_dist.cost.clock import DeviceClock, Mark
from gradckpt_dist.cost.trap import Gradients
from gradckpt_dist.storage import Forward, Storage
from gradckpt_dist.storage.buffers import BufferGuard
from gradckpt_dist.storage.hooks import hooks_withheld
from gradckpt_dist.storage.ledger import Ledger, Measurement, is_parameter
from gradckpt_dist.storage.operations import device_of
from gradckpt_dist.storage.parts import part_of

_PLAIN = (torch.Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))


@dataclass(frozen=True, kw_only=True)
class ShadowRun:
    """What one run under one storage gave. Gradients are None where nothing depends on that tensor."""

    marks: tuple[Mark, Mark, Mark]
    """Before forward, between forward and backward, after backward."""
    parameter_gradients: tuple[torch.Tensor | None, ...]
    input_gradients: tuple[torch.Tensor | None, ...]
    measurement: Measurement | None
    """Its ``peak_bytes`` is the most that forward and backward have allocated at once, where that can be told."""

    @property
    def span(self) -> tuple[Mark, Mark]:
        """Before forward, after backward."""
        return self.marks[0], self.marks[-1]

    @property
    def gradients(self) -> tuple[tuple[torch.Tensor | None, ...], tuple[torch.Tensor | None, ...]]:
        """Of parameters, and of inputs."""
        return self.parameter_gradients, self.input_gradients


class ShadowCall:
    """One call of a block as it was in the true forward: inputs, random numbers, buffers, autocast.

    Inputs are held, detached, until this object goes. Submodules' hooks run again, as they do in a recomputation;
    those of the block itself, of its parameters and of the frameworks do not.
    """

    def __init__(self, block: nn.Module, forward: Forward, args: Any, kwargs: Any) -> None:
        self._block = block
        self._forward = forward
        self._args, self._kwargs, self._inputs = _detached(args, kwargs)
        self._versions = [tensor._version for tensor in self._inputs]
        self._random = _random_states(self._inputs)
        self._autocast = _autocast_settings(self._inputs)
        self._buffers = BufferGuard(block)
        self._snapshot = self._buffers.snapshot()
        self.tokens = count_tokens(self._inputs)

    @staticmethod
    def possible(args: Any, kwargs: Any) -> bool:
        """False where an argument might be changed by a call, or tie it to the graph: caches and other objects."""
        return all(isinstance(leaf, _PLAIN) or _is_stateless(leaf) for leaf in tree_leaves((args, kwargs)))

    @property
    def intact(self) -> bool:
        """Whether the inputs still are what they were."""
        return all(one._version == other for one, other in zip(self._inputs, self._versions, strict=True))

    def separated(self, totals: Gradients) -> Gradients:
        """The gradients that come from outside of the block, given the whole ones at its outputs.

        They differ where one output is computed from another one: a mixture of experts that returns its routing.
        """
        if len(totals) < 2:
            return totals
        outside: Gradients = {}
        with self._restored(), torch.enable_grad():
            outputs = output_tensors(self._forward(*self._args, **self._kwargs))
            # A node of a higher number was made later, so that nothing with a lower one depends on it.
            for position in sorted(totals, key=lambda p: -outputs[p].grad_fn._sequence_nr()):  # type: ignore[union-attr]
                through: torch.Tensor | None = None
                if outside:
                    (through,) = torch.autograd.grad(
                        [outputs[p] for p in outside],
                        [outputs[position]],
                        list(outside.values()),
                        retain_graph=True,
                        allow_unused=True,
                    )
                total = totals[position]
                outside[position] = total if through is None else total - through
        return outside

    def run(self, storage: Storage, upstream: Gradients, clock: DeviceClock, ledger: Ledger | None = None) -> ShadowRun:
        """Forward under ``storage``, backward from ``upstream``, the gradients at the outputs.

        With a ``ledger``, bytes are counted, and the gradients of parameters are let go at once, as in training.
        """
        parameters = parameters_of(self._block)
        inputs = [tensor for tensor in self._inputs if tensor.requires_grad]
        forward, backward = (Allocations(device_of(self._inputs), enabled=ledger is not None) for _ in range(2))
        with self._restored(), hooks_withheld(parameters), torch.enable_grad():
            start = clock.mark()
            with forward:
                outputs = output_tensors(self._call(storage, ledger))
            between = clock.mark()
            with backward, _let_go([] if ledger is None else parameters):
                gradients = torch.autograd.grad(
                    [outputs[position] for position in upstream],
                    [*inputs, *parameters],
                    list(upstream.values()),
                    allow_unused=True,
                )
            end = clock.mark()
        return ShadowRun(
            marks=(start, between, end),
            input_gradients=gradients[: len(inputs)],
            parameter_gradients=gradients[len(inputs) :],
            measurement=None if ledger is None else _measurement(storage, ledger, forward, backward, outputs),
        )

    def _call(self, storage: Storage, ledger: Ledger | None) -> Any:
        if ledger is None:
            return storage.run(self._forward, *self._args, **self._kwargs)
        ledger.begin_forward()
        try:
            return ledger.run(0, storage, self._forward, self._args, self._kwargs)
        finally:
            ledger.end_forward()

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        """The random numbers, buffers and autocast of the true forward; afterwards, those of now."""
        now = _random_states(self._inputs)
        _set_random_states(self._random)
        try:
            with self._buffers.substituted(self._snapshot), contextlib.ExitStack() as stack:
                for settings in self._autocast:
                    stack.enter_context(torch.autocast(**settings))
                yield
        finally:
            _set_random_states(now)


def parameters_of(block: nn.Module) -> list[torch.Tensor]:
    """What this block's parameters are now, each once: FSDP1 has plain views of its flat parameter in their place."""
    found: dict[int, torch.Tensor] = {id(parameter): parameter for parameter in block.parameters()}
    for module in block.modules():
        views = (value for value in vars(module).values() if isinstance(value, torch.Tensor) and is_parameter(value))
        found |= {id(view): view for view in views}
    return [tensor for tensor in found.values() if tensor.requires_grad]


def count_tokens(inputs: Sequence[torch.Tensor]) -> int:
    """Elements of the first input that has a gradient to give, or else the first of floats, over its last dimension."""
    floating = [tensor for tensor in inputs if tensor.is_floating_point() and tensor.dim()]
    chosen = next((tensor for tensor in floating if tensor.requires_grad), floating[0] if floating else None)
    return 1 if chosen is None else max(1, chosen.numel() // max(1, chosen.shape[-1]))


def output_tensors(output: Any) -> list[torch.Tensor]:
    """The tensors in a block's output, each once."""
    return list({id(leaf): leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)}.values())


def _detached(args: Any, kwargs: Any) -> tuple[Any, Any, list[torch.Tensor]]:
    """The same arguments cut off the graph, and the tensors among them; one given twice stays one."""
    copies: dict[int, torch.Tensor] = {}

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, nn.Parameter):
            return leaf
        return copies.setdefault(id(leaf), leaf.detach().requires_grad_(leaf.requires_grad))

    args, kwargs = tree_map(cut, (args, kwargs))
    return args, kwargs, list(copies.values())


def _is_stateless(leaf: Any) -> bool:
    if callable(leaf) or isinstance(leaf, enum.Enum):
        return True
    values = getattr(leaf, "__dict__", {}).values()
    tied = any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)
    return not tied and not type(leaf).__name__.endswith("Cache")


@contextlib.contextmanager
def _let_go(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Have the gradients of these replaced by zeros without memory of their own."""
    handles = [tensor.register_hook(_nothing) for tensor in parameters]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nothing(grad: torch.Tensor) -> torch.Tensor | None:
    return grad.new_zeros(()).expand_as(grad) if type(grad) is torch.Tensor else None


def _measurement(
    storage: Storage, ledger: Ledger, forward: Allocations, backward: Allocations, outputs: Sequence[torch.Tensor]
) -> Measurement:
    """What the ledger counted; its peak is the allocator's where that was recorded.

    Before forward the inputs are there; before backward what is held, gradients as large as the outputs, and perhaps
    what is fetched ahead for a block of the same kind.
    """
    measured = ledger.measurement()
    if forward.peak_bytes is None or backward.peak_bytes is None:
        return measured
    upstream = sum({part.data_ptr(): part.nbytes for part in map(part_of, outputs)}.values())
    ahead = measured.keep_bytes[0] if storage.fetches_ahead else 0
    peaks = (
        measured.recompute_bytes[0] + forward.peak_bytes,
        measured.stored_bytes[0] + ahead + upstream + backward.peak_bytes,
    )
    return replace(measured, peak_bytes=max(*peaks))


def _accelerators(tensors: Sequence[torch.Tensor]) -> list[torch.device]:
    return sorted({tensor.device for tensor in tensors if tensor.device.type not in {"cpu", "meta"}}, key=str)


def _random_states(tensors: Sequence[torch.Tensor]) -> list[tuple[Any, Any]]:
    """Pairs of a setter and a state, for every generator that a block may draw from."""
    states: list[tuple[Any, Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    if "numpy" in sys.modules:
        numpy_random = sys.modules["numpy"].random
        states.append((numpy_random.set_state, numpy_random.get_state()))
    for device in _accelerators(tensors):
        module = torch.get_device_module(device)
        states.append((lambda state, d=device, m=module: m.set_rng_state(state, d), module.get_rng_state(device)))
    return states


def _set_random_states(states: list[tuple[Any, Any]]) -> None:
    for setter, state in states:
        setter(state)


def _autocast_settings(tensors: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
    """What to enter again; torch.compile guards on all of it."""
    types = ["cpu", *sorted({device.type for device in _accelerators(tensors)})]
    return [
        {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in types
        if torch.amp.is_autocast_available(kind)
    ]
