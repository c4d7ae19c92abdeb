"""Codes in the place of what a compiled forward saves, made and read inside the compiled graphs.

Saved-tensor hooks see what the forward of a compiled block saves when it is over, and have to restore all of it before
its backward begins. Here torch.compile's partitioner decides what is saved, as it would anyway; then the graphs are
rewritten, so that each activation is restored just before backward's first use of it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves

from gradckpt_dist.storage import code_operators, kernels
from gradckpt_dist.storage.code_operators import DEQUANTISE, QUANTISE
from gradckpt_dist.storage.deferred import STATISTIC_FRACTION
from gradckpt_dist.storage.lineage import Role
from gradckpt_dist.storage.quantiser import DTYPES
from gradckpt_dist.storage.saved import SMALL_BYTES

_AS_MADE = {
    torch.ops.aten.view.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.clone.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dim,
}
"""What hands on the values that it is given."""
_PRODUCTS = ("mm.", "convolution", "attention")
_MOST_PRODUCTS_HELD = 2


class CodePartitioner(CustomPartitionerFn):
    """Partitions as torch.compile does, and has activations saved as codes of ``bits``.

    What attention's backward reads has ``attention_bits``. What is an activation: see ``Role``. Parameters, statistics,
    masks, what is small or expanded, and what has sizes that are not known when the graph is compiled stay as they are.
    """

    def __init__(self, bits: int, attention_bits: int) -> None:
        self._bits = bits
        self._attention_bits = attention_bits

    def __str__(self) -> str:
        return f"codes{self._bits}"

    def uuid(self) -> Any:
        sources = (__file__, code_operators.__file__, kernels.__file__)
        return get_hash_for_files(sources, f"{self._bits} {self._attention_bits}")

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **options)
        halves = _Halves(
            forward.graph,
            backward.graph,
            outputs=options["num_fwd_outputs"],
            static=options.get("static_lifetime_input_indices") or (),
        )
        for saved in halves.activations():
            halves.hold_codes(saved, self._attention_bits if halves.is_attended(saved) else self._bits)
        for half in (forward, backward):
            half.graph.lint()
            half.recompile()
        return forward, backward


class _Halves:
    """The graphs of forward and backward. The first saves the values that the second has among its placeholders."""

    def __init__(self, forward: fx.Graph, backward: fx.Graph, *, outputs: int, static: Sequence[int]) -> None:
        self._forward = forward
        self._backward = backward
        self._output = forward.output_node()
        self._outputs = outputs
        self._places: dict[str, fx.Node] = {node.name: node for node in backward.find_nodes(op="placeholder")}
        self._roles = _roles(forward, backward, frozenset(static))

    def activations(self) -> list[fx.Node]:
        """What is saved and may be held as codes."""
        saved = [node for node in _results(self._forward)[self._outputs :] if self._is_activation(node)]
        largest = max((node.meta["val"].nbytes for node in saved), default=0)
        return [node for node in saved if node.meta["val"].nbytes >= max(SMALL_BYTES, largest * STATISTIC_FRACTION)]

    def is_attended(self, saved: fx.Node) -> bool:
        """Whether an attention's backward reads it."""
        return any("attention" in str(user.target) for user in _readers(self._restored(saved)))

    def hold_codes(self, saved: fx.Node, bits: int) -> None:
        """Save codes of ``saved`` instead, and have backward read what they stand for."""
        value: Tensor = saved.meta["val"]
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        with self._forward.inserting_before(self._after_last_use(saved)):
            flat = _call(self._forward, torch.ops.aten.permute.default, saved, order)
            codes = _call(self._forward, QUANTISE, flat, bits)
            parts = [_call(self._forward, operator.getitem, codes, n) for n in range(len(codes.meta["val"]))]
        place = self._restored(saved)
        with self._backward.inserting_before(place):
            given = [self._backward.placeholder(part.name) for part in parts]
        for placeholder, part in zip(given, parts, strict=True):
            placeholder.meta = {"val": part.meta["val"]}
        back = [order.index(i) for i in range(value.dim())]
        for users in self._near_each_other(place):
            with self._backward.inserting_before(users[0]):
                values = _call(self._backward, DEQUANTISE, given, bits, value.numel(), value.dtype)
                shaped = _call(self._backward, torch.ops.aten.view.default, values, [value.shape[i] for i in order])
                again = _call(self._backward, torch.ops.aten.permute.default, shaped, back)
            for user in users:
                user.replace_input_with(place, again)
        self._backward.erase_node(place)
        self._replace_output(saved, parts)

    def _is_activation(self, node: Any) -> bool:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return (
            isinstance(value, Tensor)
            and self._roles.get(node) is Role.ACTIVATION
            and value.dtype in DTYPES
            and all(isinstance(size, int) for size in value.shape)
            and all(stride or size == 1 for stride, size in zip(value.stride(), value.shape, strict=True))
            and not node.meta.get("saved_tensor_with_no_vc_check")
            and bool(self._restored(node).users)
        )

    def _restored(self, saved: fx.Node) -> fx.Node:
        """The placeholder by which backward is given it."""
        return self._places[saved.name]

    def _after_last_use(self, saved: fx.Node) -> fx.Node:
        """What comes next in forward once nothing else reads it."""
        last: fx.Node = max((saved, *(user for user in saved.users if user is not self._output)))
        following = last.next
        while following.op == "placeholder":
            following = following.next
        return following

    def _near_each_other(self, place: fx.Node) -> list[list[fx.Node]]:
        """The users of ``place``, in groups that have it restored once each: it is not held for two products."""
        groups: list[list[fx.Node]] = []
        products = 0
        for node in self._backward.nodes:
            products += any(name in str(node.target) for name in _PRODUCTS)
            if place in node.all_input_nodes:
                if not groups or products >= _MOST_PRODUCTS_HELD:
                    groups.append([])
                groups[-1].append(node)
                products = 0
        return groups

    def _replace_output(self, saved: fx.Node, parts: list[fx.Node]) -> None:
        before = _results(self._forward)
        position = before.index(saved, self._outputs)
        self._output.args = ((*before[:position], *parts, *before[position + 1 :]),)


def _roles(forward: fx.Graph, backward: fx.Graph, static: frozenset[int]) -> dict[fx.Node, Role]:
    """Of the values in forward; those that are made of nothing have none."""
    gradients = _results(backward)
    roles: dict[fx.Node, Role] = {}
    for index, node in enumerate(forward.find_nodes(op="placeholder")):
        trains = index < len(gradients) and gradients[index] is not None
        if trains:
            roles[node] = Role.WEIGHT if index in static else Role.ACTIVATION
        else:
            roles[node] = Role.OTHER
    for node in forward.nodes:
        if node.op == "call_function":
            made_of = {roles[source] for source in node.all_input_nodes if source in roles and _is_floating(source)}
            if made_of:
                roles[node] = _derived(node, made_of)
    return roles


def _derived(node: fx.Node, made_of: set[Role]) -> Role:
    if node.target is operator.getitem and node.args[1] != 0 and not _is_list(node.all_input_nodes[0].target):
        return Role.OTHER  # what comes second is a statistic, a mask or a random state
    if Role.ACTIVATION in made_of or made_of == {Role.WEIGHT, Role.OTHER}:
        return Role.ACTIVATION
    return made_of.pop()


def _is_list(target: Any) -> bool:
    """Whether an operator's results are alike: a tensor split into several."""
    return isinstance(target, OpOverload) and len(target._schema.returns) == 1


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(one, Tensor) and one.is_floating_point() for one in values)


def _results(graph: fx.Graph) -> tuple[Any, ...]:
    return tuple(cast("tuple[Any, ...]", graph.output_node().args[0]))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads its values, also through a view."""
    for user in node.users:
        if user.target in _AS_MADE:
            yield from _readers(user)
        else:
            yield user


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A call, with what it gives as a fake tensor, as inductor expects it."""
    node = graph.call_function(target, args)
    values = fx.map_arg(args, lambda source: source.meta["val"])
    fake = next(value for value in tree_leaves(values) if isinstance(value, FakeTensor))
    with fake.fake_mode:
        node.meta["val"] = target(*values)
    return node
