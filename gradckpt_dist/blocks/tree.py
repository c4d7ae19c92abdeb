"""The model as a tree in which wrappers are transparent, so that names are the same before and after wrapping."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from gradckpt_dist.blocks import frameworks

_WRAPPED_ATTRIBUTES = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


@dataclass(eq=False, kw_only=True)
class Node:
    """One module together with the wrappers around it.

    ``chain`` goes from the outermost wrapper to the module itself; ``aliases`` are all names, raw and canonical, under
    which any of them is found in the model.
    """

    name: str
    chain: tuple[nn.Module, ...]
    aliases: set[str]
    parent: Node | None
    children: list[Node] = field(default_factory=list)

    @property
    def core(self) -> nn.Module:
        """The module inside all wrappers."""
        return self.chain[-1]

    @property
    def own_class(self) -> type[nn.Module]:
        """The class of the core, as its author wrote it."""
        return frameworks.own_class(self.core)

    @property
    def target(self) -> nn.Module:
        """The module whose forward is switched."""
        for module in self.chain[:-1]:
            if frameworks.is_optimized(module) or frameworks.is_checkpoint_wrapper(module):
                return module
        return self.core

    @property
    def is_sharded(self) -> bool:
        """Whether it is a wrap unit of FSDP1 or FSDP2."""
        return any(frameworks.is_fsdp1(module) or frameworks.is_fsdp2(module) for module in self.chain)

    @property
    def is_callable(self) -> bool:
        """Whether it has a forward: lists and dicts of modules have none."""
        return not isinstance(self.core, nn.ModuleList | nn.ModuleDict)

    @property
    def has_parameters(self) -> bool:
        """Whether it owns weights; FSDP1 without ``use_orig_params`` leaves plain tensors in their place."""
        if next(self.chain[0].parameters(), None) is not None:
            return True
        return any(isinstance(value, torch.Tensor) for m in self.core.modules() for value in m.__dict__.values())

    def ancestors(self) -> Iterator[Node]:
        """From the parent up to the root."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    def walk(self) -> Iterator[Node]:
        """This node and all below it, in the order of ``named_modules``."""
        yield self
        for child in self.children:
            yield from child.walk()


class Tree:
    """All nodes of a model; a module that is used twice is one node, named by its first occurrence."""

    def __init__(self, model: nn.Module) -> None:
        self._by_module: dict[nn.Module, Node] = {}
        root = self._add(model, "", "", None)
        self.root = root
        self.nodes = tuple(root.walk())

    def node_of(self, module: nn.Module) -> Node | None:
        """The node whose chain holds this module."""
        return self._by_module.get(module)

    def entries(self, node: Node) -> list[Node]:
        """The nodes of the core's children, a shared one as often as it occurs."""
        return [self._by_module[child] for child in node.core._modules.values() if child is not None]

    def _add(self, module: nn.Module, name: str, raw_name: str, parent: Node | None) -> Node:
        known = self._by_module.get(module)
        if known is not None:
            known.aliases |= {name, raw_name}
            return known
        chain, raw_names = [module], [raw_name]
        while (wrapped := _wrapped_attribute(chain[-1], is_root=parent is None)) is not None:
            raw_names.append(_joined(raw_names[-1], wrapped))
            chain.append(chain[-1].get_submodule(wrapped))
        node = Node(name=name, chain=tuple(chain), aliases={name, *raw_names}, parent=parent)
        self._by_module |= dict.fromkeys(chain, node)
        for holder, prefix in zip(chain, raw_names, strict=True):
            for key, child in holder._modules.items():
                if child is None or self._by_module.get(child) is node:
                    continue
                added = self._add(child, _joined(name, key), _joined(prefix, key), node)
                if added.parent is node and added not in node.children:
                    node.children.append(added)
        return node


def outermost(nodes: Iterable[Node]) -> list[Node]:
    """Those that lie in no other of them, in the same order."""
    chosen = set(given := list(nodes))
    return [node for node in given if chosen.isdisjoint(node.ancestors())]


def _wrapped_attribute(module: nn.Module, *, is_root: bool) -> str | None:
    for attribute in _WRAPPED_ATTRIBUTES:
        if module._modules.get(attribute) is not None:
            return attribute
    # Below the root, a module with the only child `module` may be a residual connection: part of the model.
    if module._modules.get("module") is not None and (
        frameworks.is_data_parallel(module) or (is_root and len(module._modules) == 1)
    ):
        return "module"
    return None


def _joined(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
