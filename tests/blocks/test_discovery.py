from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from blocks_support import Layer, Stack, build
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gradckpt_dist.blocks import BlockKind, find_blocks
from gradckpt_dist.errors import BlocksNotFoundError

transformers = pytest.importorskip("transformers")


def _names(model: nn.Module, *patterns: str) -> list[str]:
    return [block.name for block in find_blocks(model, patterns)]


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stack(2)
        self.decoder = nn.Sequential(Layer(), Layer())
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(2))


class Engine(nn.Module):
    """Like DeepSpeed's engine: holds the model as `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Residual(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.module(x)


def test_the_outermost_homogeneous_list() -> None:
    model = build()
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == ["layers.0", "layers.1", "layers.2"]
    assert [block.module for block in blocks] == list(model.layers)
    assert {block.kind for block in blocks} == {BlockKind.EAGER}


def test_two_stacks_give_both_and_a_list_of_linear_heads_none() -> None:
    assert _names(TwoTowers()) == ["encoder.layers.0", "encoder.layers.1", "decoder.0", "decoder.1"]


def test_a_sequential_of_blocks_is_itself_the_stack() -> None:
    assert _names(nn.Sequential(Layer(), Layer())) == ["0", "1"]
    assert _names(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == ["0", "1"]


def test_a_dict_of_blocks_is_a_stack() -> None:
    model = nn.Module()
    model.layers = nn.ModuleDict({"first": Layer(), "second": Layer()})
    assert _names(model) == ["layers.first", "layers.second"]


def test_nested_stacks_give_the_outer_one_unless_its_entries_have_no_forward() -> None:
    stages = nn.Sequential(*(nn.Sequential(Layer(), Layer()) for _ in range(2)))
    assert _names(stages) == ["0", "1"]
    lists = nn.ModuleList(nn.ModuleList([Layer(), Layer()]) for _ in range(2))
    assert _names(lists) == ["0.0", "0.1", "1.0", "1.1"]


def test_a_shared_layer_is_one_block_under_its_first_name() -> None:
    layer = Layer()
    model = nn.Module()
    model.layers = nn.ModuleList([layer, Layer(), layer])
    assert _names(model) == ["layers.0", "layers.1"]
    model.layers = nn.ModuleList([layer, layer, layer])
    assert _names(model) == ["layers.0"]
    assert _names(model, "layers.2") == ["layers.0"]


def test_names_are_the_same_under_wrappers() -> None:
    plain = _names(build())
    assert _names(Engine(build())) == plain
    assert _names(Engine(Engine(build()))) == plain
    wrapped = build()
    wrapped.layers = nn.ModuleList(checkpoint_wrapper(layer) for layer in wrapped.layers)
    assert _names(Engine(wrapped)) == plain
    compiled = build()
    compiled.layers[1] = torch.compile(compiled.layers[1], backend="eager")
    blocks = find_blocks(compiled)
    assert [block.name for block in blocks] == plain
    assert [block.kind for block in blocks] == [BlockKind.EAGER, BlockKind.OPTIMIZED, BlockKind.EAGER]


def test_a_residual_connection_that_calls_its_child_module_is_no_wrapper() -> None:
    model = nn.Sequential(Residual(Layer()), Residual(nn.Linear(8, 8)))
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == ["0", "1"]
    assert [block.module for block in blocks] == list(model)


def test_names_and_globs_given_by_the_user() -> None:
    model = TwoTowers()
    assert _names(model, "decoder.1", "encoder.layers.0") == ["encoder.layers.0", "decoder.1"]
    assert _names(model, "encoder.*.1", "decoder.[01]") == ["encoder.layers.1", "decoder.0", "decoder.1"]
    assert [block.name for block in find_blocks(model, "decoder.*")] == ["decoder.0", "decoder.1"]
    assert _names(model, "*.up") == [f"{name}.up" for name in _names(model)]


def test_nested_matches_keep_the_outermost() -> None:
    assert _names(build(), "layers.*") == ["layers.0", "layers.1", "layers.2"]
    assert _names(build(), "layers.1.up", "layers.1") == ["layers.1"]


def test_a_list_named_by_the_user_stands_for_its_children() -> None:
    assert _names(build(), "layers") == ["layers.0", "layers.1", "layers.2"]
    assert _names(TwoTowers(), "decoder") == ["decoder"]


def test_raw_names_are_accepted() -> None:
    assert _names(Engine(build()), "module.layers.1") == ["layers.1"]


def test_a_pattern_without_a_match_names_the_nearest() -> None:
    with pytest.raises(BlocksNotFoundError) as caught:
        find_blocks(build(), ["layers.0", "layer.1"])
    message = str(caught.value)
    assert "'layer.1' matches no module of Stack" in message
    assert "'layers.1'" in message
    assert "blocks=['layers.*']" in message


def test_nothing_found_says_how_to_name_blocks() -> None:
    with pytest.raises(BlocksNotFoundError, match=r"no blocks were found in Layer.*blocks=\['norm', 'up'\]"):
        find_blocks(Layer())


LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}


def test_transformers_layers() -> None:
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, num_key_value_heads=2))
    assert _names(llama) == ["model.layers.0", "model.layers.1"]
    assert {block.kind for block in find_blocks(llama)} == {BlockKind.TRANSFORMERS}
    bert = transformers.BertModel(transformers.BertConfig(**LLAMA))
    assert _names(bert) == ["encoder.layer.0", "encoder.layer.1"]
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32))
    assert _names(gpt2) == ["transformer.h.0", "transformer.h.1"]
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=32)
    )
    assert _names(t5) == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


def test_no_split_modules_without_embeddings() -> None:
    class Holder(nn.Module):
        _no_split_modules = ("Embedding", "Layer", "Linear")

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.embed_positions = nn.Embedding(4, 8), nn.Embedding(4, 8)
            self.first, self.second = Layer(), Layer()
            self.head = nn.Linear(8, 4)

    assert _names(Holder()) == ["first", "second"]


def test_looking_for_blocks_imports_no_framework() -> None:
    script = (
        "import sys\n"
        "from torch import nn\n"
        "from gradckpt_dist.blocks import find_blocks\n"
        "find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))\n"
        "print([name for name in ('transformers', 'deepspeed', 'accelerate', 'timm') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
