"""``recompute``: bitwise what ``keep`` gives, for every shape of call that a block may have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._pytree import tree_leaves

from gradckpt_dist import StorageError
from gradckpt_dist.storage import STORAGES, Storage, create_storage

WIDTH = 8

# Names that torch.utils.checkpoint.checkpoint takes for itself.
ITS_OWN = ("preserve_rng_state", "use_reentrant", "context_fn", "determinism_check", "debug", "early_stop", "function")


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(functional.gelu(self.up(x))))


class Choosy(Plain):
    """Takes anything; what it is given changes the result."""

    def forward(self, x: Tensor, *others: Any, **options: Any) -> Tensor:  # type: ignore[override]
        for number, value in enumerate([*others, *options.values()], start=2):
            if isinstance(value, Tensor):
                x = x * value
            elif isinstance(value, bool):
                x = x if value else x.neg()
            elif isinstance(value, int | float):
                x = x * (value + number)
        for name in options:
            x = x + len(name)
        return super().forward(x)


class Packing(Plain):
    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.pack(super().forward(x), x * 2)


class Normed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Spectral(Plain):
    """Power iteration moves two buffers in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up = spectral_norm(self.up)


class Counting(Plain):
    """A buffer that is replaced, not written, and one that only tells how often forward ran."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("constant", torch.arange(float(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return super().forward(x + self.mean * self.calls + self.constant)


def _input(requires_grad: bool = True) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3)).requires_grad_(requires_grad)


def _make(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


Call = Callable[[Callable[..., Any], Tensor], Any]


def _trace(name: str, kind: Callable[[], nn.Module], call: Call, *, steps: int, x: Tensor) -> list[Any]:
    """Outputs, gradients, buffers and RNG state after each of ``steps`` steps."""
    block = _make(kind)
    storage = create_storage(name, block)
    record: list[Any] = []
    torch.manual_seed(1)
    for _ in range(steps):
        x.grad = None
        block.zero_grad()
        output = call(lambda *args, **kwargs: storage.run(block, *args, **kwargs), x)
        floats = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        sum(leaf.square().sum() for leaf in floats).backward()  # type: ignore[union-attr]
        record += [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(output)]
        record += [x.grad, *(parameter.grad for parameter in block.parameters())]
        record += [buffer.clone() for buffer in block.buffers()]
        record.append(torch.get_rng_state())
        record = [value.clone() if isinstance(value, Tensor) else value for value in record]
    assert storage.recomputes == (0 if name == "keep" else steps * getattr(call, "runs", 1))
    return record


def _assert_bitwise(kind: Callable[[], nn.Module], call: Call, *, steps: int = 2, requires_grad: bool = True) -> None:
    kept, redone = (_trace(name, kind, call, steps=steps, x=_input(requires_grad)) for name in ("keep", "recompute"))
    assert len(kept) == len(redone)
    for position, (one, other) in enumerate(zip(kept, redone, strict=True)):
        same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
        assert same, f"entry {position} differs"


def test_dropout() -> None:
    _assert_bitwise(Plain, lambda run, x: run(x))


def test_input_that_needs_no_gradient() -> None:
    _assert_bitwise(Plain, lambda run, x: run(x), requires_grad=False)


def test_autocast() -> None:
    def call(run: Callable[..., Any], x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return run(x)

    _assert_bitwise(Plain, call)


@pytest.mark.parametrize("frozen", [["up"], ["down"], ["up", "down"]])
def test_frozen_parameters(frozen: list[str]) -> None:
    def kind() -> nn.Module:
        block = Plain()
        for name in frozen:
            block.get_submodule(name).requires_grad_(False)
        return block

    _assert_bitwise(kind, lambda run, x: run(x))


def test_a_block_called_twice() -> None:
    def call(run: Callable[..., Any], x: Tensor) -> Any:
        return run(run(x))

    call.runs = 2  # type: ignore[attr-defined]
    _assert_bitwise(Plain, call)


@pytest.mark.parametrize("name", [*ITS_OWN, "scale", "forward", "plain", "args", "kwargs"])
@pytest.mark.parametrize("value", [True, False, 3, None, "text", torch.full((WIDTH,), 2.0)], ids=str)
def test_keywords_of_any_name_and_value(name: str, value: Any) -> None:
    _assert_bitwise(Choosy, lambda run, x: run(x, **{name: value}), steps=1)


def test_positions_and_keywords_mixed() -> None:
    other = torch.linspace(1, 2, WIDTH)
    _assert_bitwise(Choosy, lambda run, x: run(x, 2, None, other, True, last=other, debug=False, first=0.5))
    _assert_bitwise(Choosy, lambda run, x: run(x, [1, 2], {"a": other}, option={"b": (other,)}))


def test_gradient_to_a_keyword_tensor() -> None:
    gradients = []
    for name in ("keep", "recompute"):
        block, scale = _make(Choosy), torch.full((WIDTH,), 2.0, requires_grad=True)
        torch.manual_seed(1)
        create_storage(name, block).run(block, _input(), scale=scale).square().sum().backward()
        gradients.append(scale.grad)
    assert gradients[0] is not None
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize(
    "pack",
    [
        lambda y, x: (y, x),
        lambda y, x: (y, 0.5, None, "text"),
        lambda y, x: {"hidden": y, "extra": {"x": x, "none": None}},
        lambda y, x: [y, (x, [y])],
    ],
    ids=["tuple", "tuple with others", "dict", "nested"],
)
def test_packed_outputs(pack: Callable[[Tensor, Tensor], Any]) -> None:
    _assert_bitwise(lambda: Packing(pack), lambda run, x: run(x))
    block = Packing(pack)
    for name in ("keep", "recompute"):
        output = create_storage(name, block).run(block, _input())
        assert type(output) is type(pack(_input(), _input()))


@pytest.mark.parametrize("kind", [Normed, Spectral, Counting])
def test_buffers_change_once_a_step(kind: type[Plain]) -> None:
    _assert_bitwise(kind, lambda run, x: run(x), steps=4)


def test_batch_norm_counts_its_batches_once() -> None:
    block = _make(Normed)
    storage = create_storage("recompute", block)
    for step in range(1, 4):
        storage.run(block, _input()).sum().backward()
        assert block.norm.num_batches_tracked == step
    assert storage.recomputes == 3


def test_batch_norm_frozen_and_thawed_again() -> None:
    modes = iter([True, False, True, True, False, True] * 2)

    records = []
    for name in ("keep", "recompute"):
        block = _make(Normed)
        storage = create_storage(name, block)
        torch.manual_seed(1)
        record = []
        for _ in range(6):
            block.norm.train(next(modes))
            block.zero_grad()
            storage.run(block, _input()).square().sum().backward()
            record += [parameter.grad.clone() for parameter in block.parameters() if parameter.grad is not None]
            record += [buffer.clone() for buffer in block.buffers()]
        records.append(record)
    assert len(records[0]) == len(records[1]) == 6 * (6 + 3)
    assert all(torch.equal(one, other) for one, other in zip(*records, strict=True))


def test_without_backward_or_gradients_nothing_is_run_again() -> None:
    block = _make(Plain)
    storage = create_storage("recompute", block)
    storage.run(block, _input())
    with torch.no_grad():
        storage.run(block, _input())
    assert storage.recomputes == 0


def test_an_exception_reaches_the_caller_and_leaves_the_block_usable() -> None:
    class Failing(Normed):
        fail = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            if self.fail:
                raise ValueError("the block's own")
            return Plain.forward(self, x)

    block = _make(Failing)
    storage = create_storage("recompute", block)
    with pytest.raises(ValueError, match="the block's own"):
        storage.run(block, _input())
    block.fail = False
    output = storage.run(block, _input())
    block.fail = True
    running = block.norm.running_mean
    with pytest.raises(ValueError, match="the block's own"):
        output.sum().backward()
    assert block.norm.running_mean is running
    block.fail = False
    storage.run(block, _input()).sum().backward()
    assert block.norm.num_batches_tracked == 3


def test_a_forward_keeps_the_storage_that_it_began_with() -> None:
    block = _make(Plain)
    keep, recompute = create_storage("keep", block), create_storage("recompute", block)
    first, second = recompute.run(block, _input()), keep.run(block, _input())
    second.sum().backward()
    assert recompute.recomputes == 0
    first.sum().backward()
    assert recompute.recomputes == 1


def test_storages_by_name() -> None:
    block = Plain()
    for name in ("keep", "recompute"):
        storage = create_storage(name, block)
        assert isinstance(storage, Storage)
        assert type(storage) is STORAGES[name]
        assert (storage.name, storage.exact, storage.reruns) == (name, True, name == "recompute")
    with pytest.raises(StorageError, match="storage 'zip' is not available; this version has: keep, recompute"):
        create_storage("zip", block)
