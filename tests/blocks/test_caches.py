from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from blocks_support import Switches, gradients, same
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from gradckpt_dist.errors import ConflictError

transformers = pytest.importorskip("transformers")

# torch.compile looks at the .grad of activations, under a filter for logging that a filter for errors overrides.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

TOKENS = torch.tensor([[1, 5, 9, 2, 7], [3, 8, 4, 6, 0]])
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 32}


def _model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, attention_dropout=0.1)
        model = transformers.LlamaForCausalLM(config)
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=16, n_layer=3, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0
            )
        )
    elif kind == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    else:
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=32, decoder_start_token_id=0
            )
        )
    return model.train()


def _loss(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, labels=TOKENS, **kwargs).loss


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_gradients_are_bitwise_with_and_without_a_cache(kind: str, use_cache: bool) -> None:
    model = _model(kind)
    kwargs = {} if kind == "bert" else {"use_cache": use_cache}
    expected = gradients(model, lambda: _loss(model, **kwargs))
    switched = Switches(model, "keep")
    assert same(gradients(model, lambda: _loss(model, **kwargs)), expected)
    switched.set(["recompute"] * len(switched.names))
    assert same(gradients(model, lambda: _loss(model, **kwargs)), expected)
    assert set(switched.recomputes) == {1}
    switched.set([("keep", "recompute")[index % 2] for index in range(len(switched.names))])
    assert same(gradients(model, lambda: _loss(model, **kwargs)), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_cache_holds_each_kept_block_once_and_no_recomputed_one(kind: str) -> None:
    model = _model(kind)
    switched = Switches(model)
    switched.set(["keep", "recompute", "keep"])
    output = model(input_ids=TOKENS, labels=TOKENS, use_cache=True)
    cache = output.past_key_values
    output.loss.backward()
    assert [cache.get_seq_length(index) for index in range(3)] == [5, 0, 5]


def test_evaluation_and_generation_keep_their_cache() -> None:
    model = _model("llama")
    expected = model.eval().generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    switched = Switches(model)
    assert model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0).equal(expected)
    output = model(input_ids=TOKENS, labels=TOKENS, use_cache=True)
    assert [output.past_key_values.get_seq_length(index) for index in range(3)] == [5, 5, 5]
    output.loss.backward()
    assert switched.recomputes == [0, 0, 0]


def test_a_cache_that_already_holds_states_keeps_the_block_and_says_so_once() -> None:
    model = _model("llama")

    def prefix() -> Any:
        generator = torch.Generator().manual_seed(3)
        states = [tuple(torch.randn(2, 2, 4, 8, generator=generator) for _ in range(2)) for _ in range(3)]
        return transformers.DynamicCache(states)

    expected = gradients(model, lambda: _loss(model, past_key_values=prefix()))
    switched = Switches(model)
    with pytest.warns(UserWarning, match="already holds states") as caught:
        assert same(gradients(model, lambda: _loss(model, past_key_values=prefix())), expected)
    assert len(caught) == 3
    assert same(gradients(model, lambda: _loss(model, past_key_values=prefix())), expected)
    assert switched.recomputes == [0, 0, 0]


@pytest.mark.parametrize("second", ["keep", "recompute"])
def test_an_incomplete_cache_is_refused_by_the_next_forward(second: str) -> None:
    model = _model("llama")
    switched = Switches(model)
    cache = model(input_ids=TOKENS, labels=TOKENS, use_cache=True).past_key_values
    switched.set([second] * 3)
    with pytest.raises(ConflictError, match=r"LlamaDecoderLayer was recomputed.*use_cache=False"):
        model(input_ids=TOKENS, labels=TOKENS, past_key_values=cache)


def test_checkpointing_of_transformers_itself_is_taken_over_and_given_back() -> None:
    model = _model("llama")
    expected = gradients(model, lambda: _loss(model))
    calls = 0

    def counting(function: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return function(*args)

    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=counting)
    layer = model.model.layers[0]
    before = dict(layer.__dict__)
    switched = Switches(model)
    assert same(gradients(model, lambda: _loss(model)), expected)
    switched.set(["keep"] * 3)
    assert same(gradients(model, lambda: _loss(model)), expected)
    assert calls == 0
    assert layer.gradient_checkpointing is True
    switched.undo()
    assert layer.__dict__ == before
    gradients(model, lambda: _loss(model))
    assert calls == 3


def test_compiled_layers_are_two_graphs_over_all_masks() -> None:
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    model = _model("llama")
    for layer in model.model.layers:
        layer.compile(backend=backend)
    expected = gradients(model, lambda: _loss(model, use_cache=False))
    compiled = graphs
    assert compiled > 0
    switched = Switches(model, "keep")
    for storages in (["keep", "recompute", "keep"], ["recompute"] * 3, ["keep"] * 3):
        switched.set(storages)
        assert same(gradients(model, lambda: _loss(model, use_cache=False)), expected)
        assert graphs == 2 * compiled  # recompute has a graph of its own
    for storage in ("recompute", "selective"):
        switched.set([storage] * 3)
        assert same(gradients(model, lambda: _loss(model, use_cache=True)), expected)


def test_a_checkpoint_wrapper_around_a_layer_does_not_double_the_cache() -> None:
    model = _model("llama")
    expected = gradients(model, lambda: _loss(model, use_cache=True))
    layer_class = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer_class))
    switched = Switches(model)
    assert same(gradients(model, lambda: _loss(model, use_cache=True)), expected)
    assert switched.recomputes == [1, 1, 1]


def test_copies_run_by_themselves() -> None:
    model = _model("llama")
    expected = gradients(model, lambda: _loss(model))
    switched = Switches(model)
    clone = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for copied in (clone, loaded):
        assert same(gradients(copied, lambda model=copied: _loss(model)), expected)
    assert switched.calls == [0, 0, 0]
    clone._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=lambda f, *a: f(*a))
    assert same(gradients(clone, lambda: _loss(clone)), expected)
