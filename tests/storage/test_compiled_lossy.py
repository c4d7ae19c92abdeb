"""``selective8``, ``selective6``, ``selective4`` of compiled blocks: codes in the graphs, elsewhere by hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compress_support import codes_bytes, ledger_bytes
from storage_support import gradients, relative_error
from text_model import Block
from torch import Tensor, nn
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from gradckpt_dist import StorageError
from gradckpt_dist.cost.allocations import Allocations
from gradckpt_dist.storage import Storage, create_storage
from gradckpt_dist.storage.code_partitioner import CodePartitioner
from gradckpt_dist.storage.compiled_lossy import MOST_ERROR
from gradckpt_dist.storage.compress import CompressedCall
from gradckpt_dist.storage.deferred import Place

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROWS, WIDTH = 512, 64
Shapes = list[tuple[int, ...]]


class Scaled(nn.Module):
    """An MLP whose hidden values are multiplied by a table that needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        hidden = self.first(x)
        output: Tensor = self.second(functional.gelu(hidden) * table)
        return output


class Convolutions(nn.Module):
    """A residual block of images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(64)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.second(functional.silu(self.norm(self.first(x))))
        return output


class Partitioner(CustomPartitionerFn):
    """A user's own."""

    def __call__(self, gm: Any, joint_inputs: Any, **options: Any) -> Any:
        return min_cut_rematerialization_partition(gm, joint_inputs, **options)

    def uuid(self) -> str:
        return "of a test"


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """Shapes of what hooks have quantised."""
    seen: Shapes = []
    original = Place.compress

    def compress(place: Place, bits: int, noise: Any) -> None:
        if place.sample is not None:
            seen.append(tuple(place.sample.shape))
        original(place, bits, noise)

    monkeypatch.setattr(Place, "compress", compress)
    return seen


def _block(**options: Any) -> tuple[Block, Tensor, list[Tensor]]:
    """A compiled block, inputs, and its gradients."""
    torch.manual_seed(0)
    block = Block(WIDTH, 4, 0.0)
    block.compile(**options)
    x = torch.randn(4, 128, WIDTH)
    return block, x, gradients([create_storage("keep", block)], x)


def _saved(storage: Storage, *inputs: Tensor) -> list[Tensor]:
    """What a forward saves but for parameters."""
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        storage.run(storage.block, *inputs)
    return [tensor for tensor in saved if not isinstance(tensor, nn.Parameter)]


@pytest.mark.parametrize(
    ("name", "bits", "most_error"), [("selective8", 8, 0.01), ("selective6", 6, 0.04), ("selective4", 4, 0.2)]
)
def test_codes_are_made_and_read_in_the_graphs(
    name: str, bits: int, most_error: float, hooked: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x, exact = _block()
    storage = create_storage(name, block)
    errors = [relative_error(gradients([storage], x), exact) for _ in range(2)]
    assert all(0 < error < most_error for error in errors)
    assert hooked == []
    saved = _saved(storage, x.requires_grad_())
    floats = [tensor for tensor in saved if tensor.is_floating_point() and tensor.dim() > 1]
    assert {tuple(tensor.shape) for tensor in floats} == {(4, 128, 1), (4, 4, 128)}  # statistics
    # The input, attention's output projected and the MLP's hidden values; queries, keys, values and what they come to.
    attention_bits = 8 if bits == 4 else bits
    codes = codes_bytes(ROWS * WIDTH * 6, bits) + codes_bytes(ROWS * WIDTH * 4, attention_bits)
    statistics = sum(tensor.nbytes for tensor in floats)
    assert ledger_bytes(storage, x) == codes + statistics
    assert storage.held_bytes == 0
    # Where nothing is left to hooks, they are not asked again, by any storage: they would hold on to the codes.
    monkeypatch.setattr(CompressedCall, "hooks", None)
    gradients([create_storage(name, block)], x)


def test_backward_restores_one_tensor_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, _ = _block()
    peaks = []
    for _ in range(2):
        storage = create_storage("selective8", block)
        gradients([storage], x)
        output = storage.run(block, x.requires_grad_())
        with Allocations(x.device, enabled=True) as allocations:
            output.sum().backward()
        peaks.append(allocations.peak_bytes)
        # The next storage's graphs save what is quantised by hooks.
        monkeypatch.setattr("gradckpt_dist.storage.compiled_lossy._partitioner", lambda bits: None)
    graphs, hooks = peaks
    assert graphs is not None
    assert hooks is not None
    assert graphs < 0.8 * hooks


@pytest.mark.parametrize("options", [{"backend": "aot_eager"}, {"dynamic": True}], ids=str)
def test_hooks_quantise_what_the_graphs_do_not(options: dict[str, Any], hooked: Shapes) -> None:
    block, x, exact = _block(**options)
    storage = create_storage("selective6", block)
    for _ in range(2):
        hooked.clear()
        assert 0 < relative_error(gradients([storage], x), exact) < 0.04
        assert len(hooked) >= 4
    kept = ledger_bytes(create_storage("keep", block), x)
    assert ledger_bytes(storage, x) < 0.2 * kept


def test_a_partitioner_of_the_users_stays_in_force(hooked: Shapes) -> None:
    partitioner = Partitioner()
    with inductor_config.patch(custom_partitioner_fn=partitioner):
        block, x, exact = _block()
        assert 0 < relative_error(gradients([create_storage("selective8", block)], x), exact) < 0.01
        assert inductor_config.custom_partitioner_fn is partitioner
    assert hooked != []


@pytest.mark.parametrize("name", ["selective8", "compress8"])
def test_weights_of_convolutions_that_are_saved_in_another_layout_stay(name: str, hooked: Shapes) -> None:
    torch.manual_seed(0)
    block = Convolutions()
    block.compile()
    x = torch.randn(8, 32, 16, 16)
    exact = gradients([create_storage("keep", block)], x)
    assert 0 < relative_error(gradients([create_storage(name, block)], x), exact) < 0.01
    assert not {tuple(parameter.shape) for parameter in block.parameters()} & set(hooked)
    assert (hooked == []) == (name == "selective8")


def test_an_input_that_needs_no_gradient_stays_as_it_is(hooked: Shapes) -> None:
    torch.manual_seed(0)
    block = Scaled()
    block.compile()
    # A group of these spans more than codes can hold, and would come back as NaN.
    table = torch.tensor([3e38, -3e38]).repeat(ROWS, 2 * WIDTH)
    table[:, ::3] = 1.0
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    storage = create_storage("selective8", block)
    for _ in range(2):
        (gradient,) = torch.autograd.grad((storage.run(block, x, table) * 1e-38).sum(), [x])
        assert gradient.isfinite().all()
    assert hooked == []
    assert any(tensor.shape == table.shape and tensor.dtype == table.dtype for tensor in _saved(storage, x, table))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_less_often_which_codes_outweigh(dtype: torch.dtype, hooked: Shapes) -> None:
    torch.manual_seed(0)
    block = Block(WIDTH, 4, 0.1).to(dtype)
    block.compile()
    x = torch.randn(4, 128, WIDTH, dtype=dtype)
    exact = gradients([create_storage("keep", block)], x)
    with pytest.raises(StorageError, match="other roundings"):
        gradients([create_storage("selective", block)], x)
    assert 0 < relative_error(gradients([create_storage("selective8", block)], x), exact) < 0.01
    assert hooked == []


def test_other_roundings_are_told_from_other_random_numbers() -> None:
    errors = []
    for width, dtype, autocast in ((WIDTH, torch.bfloat16, False), (256, torch.float32, True)):
        torch.manual_seed(0)
        block = Block(width, 4, 0.01).to(dtype)
        block.compile()
        storage: Any = create_storage("selective4", block)
        x = torch.randn(4, 128, width, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            errors.append(storage._variant.compare(block, (x,), {}).relative_error)
            if autocast:
                with pytest.raises(StorageError, match="pytorch#190758"):
                    storage.run(block, x)
    roundings, random_numbers = errors
    assert 0 < roundings < 0.5 * MOST_ERROR
    assert random_numbers > 5 * MOST_ERROR


def test_rounding_takes_seeds_of_its_own() -> None:
    block, x, _ = _block()
    storage = create_storage("selective4", block)
    draws, state = storage.noise.draws, torch.get_rng_state()  # type: ignore[attr-defined]
    runs = [gradients([storage], x) for _ in range(2)]
    assert storage.noise.draws > draws  # type: ignore[attr-defined]
    assert any(not torch.equal(one, other) for one, other in zip(*runs, strict=True))
    torch.set_rng_state(state)


def test_gradients_of_gradients_are_refused_by_each_call() -> None:
    block, x, _ = _block()
    storage = create_storage("selective8", block)
    for _ in range(2):
        with pytest.raises(StorageError, match="create_graph"):
            gradients([storage], x, create_graph=True)


def test_inductor_may_cache_what_each_width_compiles_to() -> None:
    uuids = {CodePartitioner(bits, 8).uuid() for bits in (8, 6, 4)}
    assert len(uuids) == 3
    assert None not in uuids
