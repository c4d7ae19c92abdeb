"""Outputs go to the calls that they came from, once, and only as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gradckpt_dist import StorageError
from gradckpt_dist.storage.operation_cache import Entry, OperationCache, random_state, save, set_random_state
from gradckpt_dist.storage.operations import Kind, Operation

EXPENSIVE = Operation(kind=Kind.EXPENSIVE, local=True)


def add(cache: OperationCache, name: str, output: object = None) -> Entry:
    entry = cache.add((name,), EXPENSIVE, cache.occurrence(name))
    if output is not None:
        cache.hold(entry, output)
    return entry


def sealed(cache: OperationCache) -> OperationCache:
    """After a forward that has saved something at its end."""
    cache.packs += 1
    cache.seal(save)
    cache.rewind()
    return cache


def test_each_call_takes_its_own_output_once() -> None:
    cache = OperationCache()
    a1, b, a2 = torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 3.0)
    for name, output in (("a", a1), ("b", b), ("a", a2)):
        add(cache, name, output)
    sealed(cache)
    taken = [cache.take((name,)) for name in ("unknown", "a", "a", "b")]
    assert taken[0] is None
    assert [one[0].tolist() for one in taken[1:] if one] == [[1, 1], [3, 3], [2, 2]]
    assert cache.given == 3
    cache.finish()
    cache.rewind()
    assert [cache.take((name,)) for name in ("a", "b", "a")] == [None] * 3
    assert cache.given == 0


def test_what_is_given_shares_memory_with_the_output() -> None:
    cache = OperationCache()
    output = torch.ones(2)
    add(cache, "a", output)
    found = sealed(cache).take(("a",))
    assert found is not None
    assert found[0].data_ptr() == output.data_ptr()


def test_a_call_that_is_not_held_keeps_its_place() -> None:
    cache = OperationCache()
    add(cache, "a")
    add(cache, "a", torch.ones(2))
    sealed(cache)
    assert cache.take(("a",)) is None
    assert cache.take(("a",)) is not None
    assert cache.take(("a",)) is None


def test_a_structure_comes_back_as_it_was() -> None:
    cache = OperationCache()
    add(cache, "a", (torch.ones(2), [torch.zeros(1), None], 7))
    found = sealed(cache).take(("a",))
    assert found is not None
    one, (two, nothing), number = found[0]
    assert (one.tolist(), two.tolist(), nothing, number) == ([1, 1], [0], None, 7)


def test_sparse_outputs_are_not_held() -> None:
    cache = OperationCache()
    add(cache, "a", torch.eye(2).to_sparse())
    assert sealed(cache).take(("a",)) is None


def test_an_output_is_copied_before_a_write_through_any_view() -> None:
    cache = OperationCache()
    output = torch.arange(6.0).view(2, 3).t()
    add(cache, "a", output)
    cache.before_write([torch.ones(2)])
    cache.before_write([output[1:]])
    output.zero_()
    found = sealed(cache).take(("a",))
    assert found is not None
    assert found[0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found[0].stride() == output.stride()


def test_an_output_whose_layout_a_copy_would_change_is_let_go() -> None:
    cache = OperationCache()
    output = torch.ones(2, 1).expand(2, 3)
    add(cache, "a", output)
    cache.before_write([output])
    assert sealed(cache).take(("a",)) is None


def test_an_output_written_to_after_the_forward_is_not_given() -> None:
    cache = OperationCache()
    output = torch.ones(4)
    add(cache, "a", output)
    sealed(cache)
    output[:2].add_(1)
    assert cache.take(("a",)) is None


def test_a_layout_changed_by_hooks_is_not_given() -> None:
    cache = OperationCache()
    add(cache, "a", torch.ones(3, 2).t())
    with saved_tensors_hooks(lambda tensor: tensor.contiguous(), lambda tensor: tensor):
        sealed(cache)
    assert cache.take(("a",)) is None


def test_what_comes_after_the_last_saved_tensor_is_not_held() -> None:
    cache = OperationCache()
    seen: list[Tensor] = []
    x = torch.ones(2, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor), cache.counting(seen.append):
        add(cache, "a", torch.ones(2))
        y = x.exp() * x.sin()
        add(cache, "b", torch.ones(2))
    cache.seal(save)
    cache.rewind()
    assert cache.packs == len(seen) == 4
    assert cache.take(("a",)) is not None
    assert cache.take(("b",)) is None
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, x.detach().exp() * (x.detach().sin() + x.detach().cos()))


def test_counting_without_hooks_outside_does_nothing() -> None:
    cache = OperationCache()
    with cache.counting():
        torch.ones(2, requires_grad=True).exp()
    assert cache.packs == 0


@pytest.mark.parametrize(("again", "wrong"), [(1, True), (2, False), (3, True)])
def test_another_number_of_calls_is_an_error(again: int, wrong: bool) -> None:
    cache = OperationCache()
    for _ in range(2):
        add(cache, "a", torch.ones(2))
    sealed(cache)
    for _ in range(again):
        cache.take(("a",))
    if wrong:
        with pytest.raises(StorageError, match=f"called a .* 2 times in its forward and {again} times when"):
            cache.finish()
    else:
        cache.finish()


def test_another_number_of_calls_that_were_given_nothing_is_none() -> None:
    cache = OperationCache()
    add(cache, "a")
    add(cache, "b", torch.ones(2))
    sealed(cache)
    for name in ("a", "a", "b"):
        cache.take((name,))
    cache.finish()


def test_a_random_call_leaves_the_generator_as_it_did() -> None:
    cache = OperationCache()
    torch.manual_seed(0)
    output = torch.rand(3)
    entry = add(cache, "a", output)
    entry.random_state = random_state((output,))
    expected = torch.rand(3)
    sealed(cache)
    torch.manual_seed(0)
    assert cache.take(("a",)) is not None
    assert torch.equal(torch.rand(3), expected)


def test_random_states_of_the_host() -> None:
    assert random_state((1, "a")) is None
    state = random_state([torch.ones(1)])
    assert state is not None
    expected = torch.rand(2)
    set_random_state(*state)
    assert torch.equal(torch.rand(2), expected)
