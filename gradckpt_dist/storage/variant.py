"""A block that the user compiled, compiled once more, otherwise; and what that changes."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from gradckpt_dist.storage.base import Forward
from gradckpt_dist.storage.buffers import BufferGuard
from gradckpt_dist.storage.hooks import hooks_withheld
from gradckpt_dist.storage.ledger import storage_bytes
from gradckpt_dist.storage.operations import autocast_of, device_of
from gradckpt_dist.storage.parts import is_whole_parameter
from gradckpt_dist.storage.verdict import Outcome, Verdict

_Compiler = Callable[[Any], Any]


def is_compiled(block: nn.Module) -> bool:
    """Whether the user has compiled this block, by ``block.compile()`` or ``torch.compile(block)``."""
    return getattr(block, "_compiled_call_impl", None) is not None or hasattr(block, "dynamo_ctx")


class Variant:
    """Calls one block by ``call(core, *args, **kwargs)``, compiled with the backend and the options of the user.

    ``settings``: what torch.compile is told for it alone. Blocks of one class share what is compiled, and blocks of one
    structure share verdicts.
    """

    def __init__(self, block: nn.Module, call: Callable[..., Any], settings: Settings | None = None) -> None:
        self._core: nn.Module = getattr(block, "_orig_mod", block)
        self._shared = _Compilation.of(block, self._core, call, settings or Settings())
        self._parts = tuple(self._core.modules())
        self._structure = self._shared.number_of(_structure(self._core))
        self.is_whole = all(map(is_whole_parameter, self._core.parameters()))
        """Whether all of its weights are on this rank."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the block's forward."""
        return self._shared(self._core, *args, **kwargs)

    @property
    def verdicts(self) -> int:
        """How many there are, of blocks with this structure."""
        return sum(structure == self._structure for structure, *_ in self._shared.verdicts)

    @property
    def complete(self) -> set[tuple[Any, ...]]:
        """Keys of calls whose graphs save all that is to be codes as codes; for its user to note."""
        return self._shared.complete

    def known(self, args: Any, kwargs: Any) -> Verdict | None:
        """The verdict on blocks of this structure with such inputs, if there is one."""
        return self._shared.verdicts.get(self.key(args, kwargs))

    def compare(self, forward: Forward, args: Any, kwargs: Any) -> Verdict:
        """The verdict; the first time, forward and backward are run twice each, without a trace."""
        key = self.key(args, kwargs)
        if key not in self._shared.verdicts:
            self._shared.verdicts[key] = self._compare(forward, args, kwargs)
        return self._shared.verdicts[key]

    def key(self, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """All on which the choice of what to compute again, and so its correctness, may depend."""
        tensors = _tensors((args, kwargs))
        inputs = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors)
        return (self._structure, inputs, autocast_of(tensors), tuple(part.training for part in self._parts))

    def _compare(self, forward: Forward, args: Any, kwargs: Any) -> Verdict:
        theirs = self._outcome(forward, args, kwargs)
        saved: dict[int, int] = {}
        with saved_tensors_hooks(lambda tensor: _count(tensor, saved), lambda tensor: tensor):
            ours = self._outcome(self, args, kwargs)
        return Verdict(
            exact=ours.equals(theirs),
            relative_error=ours.relative_error(theirs),
            held_bytes=sum(saved.values()),
            largest_bytes=max(saved.values(), default=0),
            input_bytes=sum(storage_bytes((args, kwargs)).values()),
        )

    def _outcome(self, call: Forward, args: Any, kwargs: Any) -> Outcome:
        """With the coming call's random numbers; all stays as it is."""
        args, kwargs = tree_map_only(Tensor, _leaf, (args, kwargs))
        parameters = tuple(self._core.parameters())
        wanted = [tensor for tensor in (*_tensors((args, kwargs)), *parameters) if tensor.requires_grad]
        guard, device = BufferGuard(self._core), device_of(wanted)
        with _same_random_numbers(device), guard.substituted(guard.snapshot()), hooks_withheld(parameters):
            outputs = [out for out in _tensors(call(*args, **kwargs)) if out.requires_grad]
            following = torch.rand((), device=device)
            ones = [torch.ones_like(out) for out in outputs]
            gradients = torch.autograd.grad(outputs, wanted, ones, allow_unused=True)
            values = (*(out.detach() for out in outputs), *gradients)
            return Outcome(values=values, states=(*self._core.buffers(), following))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What torch.compile is told for one variant; None leaves it to the user.

    ``budget``: the activation memory budget, a fraction. ``partitioner``: what divides the traced graph into forward
    and backward, if the user has not named one; only inductor asks for it.
    """

    budget: float | None = None
    partitioner: Any = None

    def __str__(self) -> str:
        budget = "" if self.budget is None else f"_{round(100 * self.budget)}"
        return budget + ("" if self.partitioner is None else f"_{self.partitioner}")

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """While the variant is called, as any call may compile."""
        with ExitStack() as stack:
            if self.budget is not None:
                stack.enter_context(_set(functorch_config, "activation_memory_budget", self.budget))
            if self.partitioner is not None:
                # Imported here: it takes a second, and not every run has such a variant.
                from torch._inductor import config as inductor_config  # noqa: PLC0415

                if inductor_config.custom_partitioner_fn is None:
                    stack.enter_context(_set(inductor_config, "custom_partitioner_fn", self.partitioner))
            yield


@contextmanager
def _set(config: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)


class _Compilation:
    """What blocks of one class share. It has a code object of its own, as torch.compile caches by that."""

    _all: ClassVar[list[_Compilation]] = []

    def __init__(
        self, compiler: _Compiler, kind: type[nn.Module], call: Callable[..., Any], settings: Settings
    ) -> None:
        name = f"{call.__name__}_{kind.__name__}{settings}"
        function = types.FunctionType(call.__code__.replace(co_name=name), call.__globals__, name)
        self._made_of = (kind, call, settings)
        self._compiler = compiler
        self._compiled = compiler(function)
        self._settings = settings
        self._structures: dict[tuple[Any, ...], int] = {}
        self.verdicts: dict[tuple[Any, ...], Verdict] = {}
        self.complete: set[tuple[Any, ...]] = set()

    @classmethod
    def of(cls, block: nn.Module, core: nn.Module, call: Callable[..., Any], settings: Settings) -> _Compilation:
        compiler, made_of = _compiler(block), (type(core), call, settings)
        for one in cls._all:
            if one._made_of == made_of and _do_the_same(one._compiler, compiler):
                return one
        cls._all.append(cls(compiler, *made_of))
        return cls._all[-1]

    def number_of(self, structure: tuple[Any, ...]) -> int:
        """The same for equal structures."""
        return self._structures.setdefault(structure, len(self._structures))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._settings.in_force():
            return self._compiled(*args, **kwargs)


def _compiler(block: nn.Module) -> _Compiler:
    """What the user compiled this block with: backend, mode and dynamic shapes included."""
    if hasattr(block, "dynamo_ctx"):
        return block.dynamo_ctx  # type: ignore[return-value]
    compiled: Any = block._compiled_call_impl
    compiled = getattr(compiled, "original", compiled)
    context = inspect.getclosurevars(compiled).nonlocals.get("self")
    return context if callable(context) else torch.compile


def _do_the_same(one: Any, other: Any) -> bool:
    """Whether two results of ``_compiler`` have the same backend and options."""
    if one is torch.compile or other is torch.compile:
        return one is other
    backends = [torch._dynamo.eval_frame.innermost_backend(compiler.callback) for compiler in (one, other)]
    return bool(backends[0] == backends[1] and one._dynamic == other._dynamic)


def _structure(core: nn.Module) -> tuple[Any, ...]:
    """Submodules and parameters, and all numbers that may be a dropout's rate."""
    parameters = tuple((p.shape, p.dtype, p.requires_grad) for p in core.parameters())
    numbers = tuple(
        (index, name, value)
        for index, part in enumerate(core.modules())
        for name, value in vars(part).items()
        if isinstance(value, float)
    )
    return repr(core), parameters, numbers


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """What is drawn inside is drawn again after it."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            yield


def _count(tensor: Tensor, saved: dict[int, int]) -> Tensor:
    saved.update(storage_bytes(tensor))
    return tensor.detach()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
