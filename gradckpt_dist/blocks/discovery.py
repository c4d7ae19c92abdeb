"""Finding the blocks of a model: the units that each get one storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from fnmatch import fnmatchcase

from torch import nn

from gradckpt_dist.blocks import frameworks
from gradckpt_dist.blocks.conflicts import check_conflicts
from gradckpt_dist.blocks.tree import Node, Tree, outermost
from gradckpt_dist.errors import BlocksNotFoundError


class BlockKind(Enum):
    """What kind of module a block is, hence which of its attributes the switch replaces."""

    EAGER = "eager"
    """A plain module: its instance ``forward``."""
    COMPILED = "compiled"
    """``block.compile()`` was called: ``_compiled_call_impl``, so that the compiled code stays one graph."""
    OPTIMIZED = "optimized"
    """``torch.compile(block)`` stands in the model: the OptimizedModule's ``forward``, for the same reason."""
    TRANSFORMERS = "transformers"
    """A transformers ``GradientCheckpointingLayer``: its instance ``forward``, its own checkpointing held off."""
    CHECKPOINT_WRAPPER = "checkpoint_wrapper"
    """PyTorch's ``CheckpointWrapper``: the wrapper's ``forward``, in place of its ``checkpoint_fn``."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One unit of decision.

    ``name`` has no parts that a wrapper added (``module``, ``_fsdp_wrapped_module``, ``_checkpoint_wrapped_module``,
    ``_orig_mod``), so that it is the same before and after wrapping. ``module`` is the one whose forward is switched:
    inside FSDP1, but a CheckpointWrapper or an OptimizedModule itself.
    """

    name: str
    module: nn.Module
    kind: BlockKind


def find_blocks(model: nn.Module, patterns: Sequence[str] = ()) -> tuple[Block, ...]:
    """The blocks of a model, in the order of ``model.named_modules()``.

    With ``patterns``: the modules of these names, or whose names match these globs (case-sensitive; ``*`` also matches
    dots). The outermost matches are taken and those nested in them dropped; a ModuleList or ModuleDict, having no
    forward, stands for its children. Without: the first that yields any of

    1. FSDP wrap units below the root whose class occurs more than once;
    2. transformers' ``GradientCheckpointingLayer``; then the classes in ``_no_split_modules``, embeddings excepted;
    3. the children of the outermost ModuleLists, ModuleDicts and Sequentials of two or more of one class, those with
       submodules of their own first;
    4. any FSDP wrap units below the root.

    A module that is used more than once is one block, under the first of its names.

    Raises:
        BlocksNotFoundError: nothing was found, or a pattern matches no module.
        ConflictError: as ``check_conflicts``.
    """
    tree = Tree(model)
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    nodes = _matching(tree, patterns) if patterns else _discovered(tree)
    if not nodes:
        raise BlocksNotFoundError(
            f"no blocks were found in {type(tree.root.core).__name__}: it has no FSDP wrap units, no transformers "
            "layers and no ModuleList or Sequential of two or more modules of one class; "
            f"name them, for example blocks={_example(tree)}"
        )
    by_target = {node.target: node for node in reversed(nodes)}  # one module in two wrappers is one block
    blocks = tuple(
        Block(name=node.name, module=node.target, kind=_kind(node.target))
        for node in nodes
        if by_target[node.target] is node
    )
    check_conflicts(model, blocks)
    return blocks


def _kind(module: nn.Module) -> BlockKind:
    if frameworks.is_compiled(module):
        return BlockKind.COMPILED
    if frameworks.is_optimized(module):
        return BlockKind.OPTIMIZED
    if frameworks.is_checkpoint_wrapper(module):
        return BlockKind.CHECKPOINT_WRAPPER
    if frameworks.is_transformers_layer(module):
        return BlockKind.TRANSFORMERS
    return BlockKind.EAGER


def _matching(tree: Tree, patterns: Sequence[str]) -> list[Node]:
    candidates = [node for node in tree.nodes if node is not tree.root]
    chosen: set[Node] = set()
    for pattern in patterns:
        found = [node for node in candidates if any(fnmatchcase(alias, pattern) for alias in node.aliases)]
        if not found:
            names = [node.name for node in candidates]
            near = get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise BlocksNotFoundError(
                f"blocks: {pattern!r} matches no module of {type(tree.root.core).__name__}; "
                + (f"the nearest names are {', '.join(map(repr, near))}; " if near else "")
                + f"give names or globs, for example blocks={_example(tree)}"
            )
        chosen.update(part for node in found for part in _callable_parts(tree, node))
    return outermost(node for node in tree.nodes if node in chosen)


def _callable_parts(tree: Tree, node: Node) -> list[Node]:
    if node.is_callable:
        return [node]
    return [part for child in tree.entries(node) for part in _callable_parts(tree, child)]


def _discovered(tree: Tree) -> list[Node]:
    below_root = [node for node in tree.nodes if node is not tree.root]
    units = [node for node in below_root if node.is_sharded and node.is_callable]
    return (
        _repeated(_block_units(tree, units))
        or outermost(node for node in below_root if frameworks.is_transformers_layer(node.core))
        or _unsplit(tree)
        or _stacked(tree)
        or outermost(units)
    )


def _block_units(tree: Tree, units: Sequence[Node]) -> list[Node]:
    """The outermost units, a unit that holds whole stacks of units (an encoder, say) being replaced by those."""
    found: list[Node] = []
    for unit in outermost(units):
        inner = [node for node in units if unit in node.ancestors()]
        stacked = any(_in_stack(tree, node) for node in inner)
        if stacked and not _in_stack(tree, unit):
            found += _block_units(tree, inner)
        else:
            found.append(unit)
    return found


def _repeated(nodes: Iterable[Node]) -> list[Node]:
    given = list(nodes)
    counts = Counter(node.own_class for node in given)
    return [node for node in given if counts[node.own_class] > 1]


def _unsplit(tree: Tree) -> list[Node]:
    names = {name for node in tree.nodes for name in getattr(node.own_class, "_no_split_modules", None) or ()}
    nodes = outermost(
        node
        for node in tree.nodes
        if node.own_class.__name__ in names
        and node is not tree.root
        and "Embedding" not in node.own_class.__name__
        and node.has_parameters
    )
    repeated = set(_repeated(nodes))
    return [
        node
        for node in nodes
        if node in repeated or (node.parent is not None and isinstance(node.parent.core, nn.ModuleList))
    ]


def _stacked(tree: Tree) -> list[Node]:
    stacks = [node for node in tree.nodes if _is_stack(tree, node)]
    composite = [node for node in stacks if tree.entries(node)[0].children]
    blocks = {child for stack in outermost(composite or stacks) for child in tree.entries(stack)}
    return [node for node in tree.nodes if node in blocks]


def _is_stack(tree: Tree, node: Node) -> bool:
    if not isinstance(node.core, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return False
    entries = tree.entries(node)
    return (
        len(entries) > 1
        and len({entry.own_class for entry in entries}) == 1
        and all(entry.is_callable and entry.has_parameters for entry in entries)
    )


def _in_stack(tree: Tree, node: Node) -> bool:
    return node.parent is not None and _is_stack(tree, node.parent)


def _example(tree: Tree) -> list[str]:
    stacked = _stacked(tree) or _repeated(node for node in tree.nodes if node.children and node is not tree.root)
    if stacked and "." in stacked[0].name:
        return [f"{stacked[0].name.rpartition('.')[0]}.*"]
    named = [node.name for node in stacked] or [node.name for node in tree.root.children]
    return named[:2] or ["layers.*"]
