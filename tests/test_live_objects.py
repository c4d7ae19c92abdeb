"""Objects found by their class."""

from __future__ import annotations

from typing import Any

from gradckpt_dist.live_objects import live_objects


class Kept:
    pass


class Derived(Kept):
    pass


class Pretender:
    """A proxy that says that it is one, and fails at being asked for anything else."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Kept
        raise AssertionError(name)


def test_those_of_the_class_and_of_derived_ones() -> None:
    kept, derived, pretender = Kept(), Derived(), Pretender()
    assert isinstance(pretender, Kept)
    assert {id(one) for one in live_objects(Kept)} == {id(kept), id(derived)}
    assert [id(one) for one in live_objects(Derived)] == [id(derived)]
    del kept, derived
    assert list(live_objects(Kept)) == []
