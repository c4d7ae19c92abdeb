"""What operators are taken for, and when two calls are the same call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._ops import OpOverload

import gradckpt_dist.storage.operations as under_test
from gradckpt_dist.storage.operations import Kind, describe, differentiable, inner_tensors, signature, written

aten = torch.ops.aten
KINDS = {
    Kind.EXPENSIVE: [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.linear.default,
        aten.convolution.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_mm.default,
        aten._grouped_mm.default,
        aten._fft_r2c.default,
    ],
    Kind.ROUTING: [
        aten.topk.default,
        aten.sort.default,
        aten.argmax.default,
        aten.max.dim,
        aten.nonzero.default,
        aten.multinomial.default,
    ],
    Kind.CHEAP: [
        aten.gelu.default,
        aten.add.Tensor,
        aten.native_layer_norm.default,
        aten._softmax.default,
        aten.max.default,
        aten.embedding.default,
        aten.upsample_bilinear2d.default,
        aten._convert_indices_from_coo_to_csr.default,
    ],
    Kind.WRITES: [aten.add_.Tensor, aten.mm.out, aten.copy_.default, aten.bernoulli_.float, aten._foreach_add_.List],
    Kind.OTHER: [
        aten.view.default,
        aten.t.default,
        aten._unsafe_view.default,
        aten._to_copy.default,
        aten.native_dropout.default,
        aten.empty_like.default,
        aten.detach.default,
        aten.native_batch_norm.default,
        aten._fused_sdp_choice.default,
        aten.convolution_backward.default,
        aten._scaled_dot_product_flash_attention_backward.default,
        aten._local_scalar_dense.default,
    ],
}


@pytest.mark.parametrize(
    ("kind", "function"), [(kind, function) for kind in KINDS for function in KINDS[kind]], ids=str
)
def test_kinds_of_pytorchs_own_operators(kind: Kind, function: Any) -> None:
    assert describe(function).kind is kind
    assert describe(function).local is (kind is not Kind.WRITES)


def test_kinds_of_collectives() -> None:
    import torch.distributed._functional_collectives  # defines them

    functional = torch.ops._c10d_functional
    for sent in ("all_reduce", "reduce_scatter_tensor", "all_to_all_single", "broadcast", "all_gather_into_tensor"):
        operation = describe(getattr(functional, sent).default)
        assert (operation.kind, operation.local) == (Kind.COMMUNICATION, False)
        assert operation.gathers is (sent == "all_gather_into_tensor")
    assert describe(functional.wait_tensor.default).kind is Kind.OTHER
    in_place = describe(torch.ops.c10d.allreduce_.default)
    assert in_place.kind is Kind.WRITES
    tensor = torch.ones(2)
    assert written(in_place, ([tensor], None), {})[0] is tensor


def test_nothing_else_is_ever_held() -> None:
    assert describe(len).kind is Kind.OTHER
    assert describe(torch.ops.prim.device.default).kind is Kind.OTHER


def test_every_operator_that_may_be_held_returns_new_tensors_and_changes_none() -> None:
    held = 0
    for name in dir(aten):
        packet = getattr(aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            function = getattr(packet, overload)
            if isinstance(function, OpOverload) and describe(function).kind not in (Kind.OTHER, Kind.WRITES):
                held += 1
                schema = function._schema
                assert not schema.is_mutable
                assert all(value.alias_info is None for value in (*schema.arguments, *schema.returns))
    assert held > 500


def test_operators_of_others_by_name() -> None:
    library = torch.library.Library("gradckpt_test", "DEF")
    for name in ("flash_attn_varlen", "fused_gelu"):
        library.define(f"{name}(Tensor x) -> Tensor")
    operations = [describe(getattr(torch.ops.gradckpt_test, n).default) for n in ("flash_attn_varlen", "fused_gelu")]
    assert [(operation.kind, operation.local) for operation in operations] == [
        (Kind.EXPENSIVE, False),
        (Kind.OTHER, False),
    ]
    assert operations[0].attends
    library._destroy()


def test_attention_draws_only_with_dropout() -> None:
    attention = describe(aten._scaled_dot_product_flash_attention.default)
    q = torch.ones(1)
    assert attention.attends
    assert not attention.draws((q, q, q), {})
    assert not attention.draws((q, q, q, 0.0), {})
    assert attention.draws((q, q, q, 0.1), {})
    assert attention.draws((q, q, q), {"dropout_p": 0.1})
    assert describe(aten.multinomial.default).draws((q, 1), {})
    assert not describe(aten.mm.default).draws((q, q), {})


def test_signatures_tell_calls_apart() -> None:
    one, other = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    x, function = torch.ones(4, 4), aten.addmm.default
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, x, x), {}),
        ((x, x, x.double()), {}),
        ((x, x, x[:2]), {}),
        ((x, x, one), {}),
        ((x, x, other), {}),
        ((x, x, one.view(2, 4, 2)[0]), {}),
        ((x, x, x), {"beta": 2}),
        ((x, x, x), {"alpha": 2}),
        (([x, x], x), {}),
        ((x, [x, x]), {}),
    ]
    assert len({signature(function, *call) for call in calls}) == len(calls)
    assert signature(function, (x, x, x), {}) != signature(aten.mm.default, (x, x, x), {})
    for args, kwargs in calls:
        assert signature(function, args, kwargs) == signature(function, args, kwargs)
    assert signature(function, (x + 1, x, one.t()), {}) == signature(function, (x, x, one.t()), {})


def test_written_arguments() -> None:
    x, y = torch.ones(2), torch.ones(2)
    add, out = describe(aten.add_.Tensor), describe(aten.mm.out)
    (first,) = written(add, (x, y), {})
    assert first is x
    (given,) = written(out, (x, x), {"out": y})
    assert given is y
    listed = written(describe(aten._foreach_add_.List), ([x, y], [y, y]), {})
    assert [id(tensor) for tensor in listed] == [id(x), id(y)]


def test_differentiable_calls() -> None:
    plain, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    assert differentiable((plain, leaf))
    assert differentiable(([plain, leaf], 0))
    assert not differentiable((plain, [plain], 1.0, None))
    with torch.no_grad():
        assert not differentiable((leaf,))


def test_inner_tensors_are_strided() -> None:
    x, sparse = torch.ones(2), torch.eye(2).to_sparse()
    assert list(map(id, inner_tensors([x, {"a": (sparse, 3)}, None]))) == [id(x)]
    assert under_test.storage_key(x) == under_test.storage_key(x[1:]) != under_test.storage_key(x.clone())
