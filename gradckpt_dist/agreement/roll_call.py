"""Comparing texts over ranks through the process group's store: for rare moments, where no collective may be risked.

Texts are JSON and are parsed as data, never evaluated or unpickled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import Store

from gradckpt_dist.errors import AgreementError

logger = logging.getLogger("gradckpt_dist")

Facts = Mapping[str, Any]

JOINED_SECONDS = 10.0
"""How much later than the first the last rank may come to save its state, and still be part of it."""

_MAX_TEXT_BYTES = 1 << 22
_LAST_WORDS_SECONDS = 10.0
"""How far apart the survivors of a dead rank may see a collective fail, and still name the dead one only."""
_MISSING_KEY = "failed/missing"
_ENDED, _FAILED = "ended", "failed"
_DEEDS = {_FAILED: "had stopped with an error", "": "did not answer", _ENDED: "had ended"}
"""What a missing rank did, by the word that it left; the worst comes first."""
_VERDICT_SECONDS = 3.0
"""What the first rank gets, once its own time is up, to say who is missing."""


class RollCall:
    """All ``ranks`` (global ranks, in order) meet under keys of ``store``."""

    def __init__(self, store: Store, rank: int, ranks: Sequence[int], timeout_seconds: float) -> None:
        self._store = store
        self._rank = rank
        self._ranks = ranks
        self._timeout = timedelta(seconds=timeout_seconds)
        self._calls = 0
        self._asked = 0
        self._left_alone = self._left = False

    def compare(self, facts: Facts, step: int) -> None:
        """Return once every rank has given equal facts. Called by all ranks, in the same order of calls.

        Raises:
            AgreementError: naming the first rank and field that differ, or the ranks that did not come in time.
        """
        self._calls += 1
        try:
            verdict = self._confer(f"compare/{self._calls}", facts, step)
        except RuntimeError as error:
            cause = str(error).splitlines()[0]
            raise AgreementError(f"the store of the process group cannot be reached: {cause}", step=step) from error
        if verdict is not None:
            raise AgreementError(verdict["reason"], rank=verdict["rank"], step=step)

    def _confer(self, call: str, facts: Facts, step: int) -> dict[str, Any] | None:
        self._store.set(f"{call}/{self._rank}", json.dumps(facts))
        verdict_key = f"{call}/verdict"
        if self._rank == self._ranks[0]:
            self._store.set(verdict_key, json.dumps(self._judge(call)))
        elif not self._verdict_arrived(call, verdict_key):
            raise AgreementError(f"no word within {self._timeout.total_seconds():g} s", rank=self._ranks[0], step=step)
        return self._read_verdict(verdict_key)

    def all_here(self, step: int) -> bool:
        """Whether every rank makes this call, its first, second and so on, at this step and within ``JOINED_SECONDS``.

        The same on all ranks: the first one that has waited in vain says so for all. It does not wait another time.
        """
        if self._left_alone:
            return False
        self._asked += 1
        call = f"here/{self._asked}/{step}"
        seconds = min(JOINED_SECONDS, self._timeout.total_seconds())
        complete = self._store.add(f"{call}/count", 1) == len(self._ranks)
        complete = complete or self._arrived([f"{call}/verdict"], timedelta(seconds=seconds))
        verdict = self._store.compare_set(f"{call}/verdict", "", "yes" if complete else "no")
        self._left_alone = verdict != b"yes"
        if self._left_alone:
            logger.warning(
                "gradckpt: state_dict() on rank %d was not joined by all others within %g s: this state and later ones "
                "leave out what was gathered since the last decision; call it on every rank after the same step",
                self._rank,
                seconds,
            )
        return not self._left_alone

    def survivors(self) -> list[int]:
        """The ranks that have also seen a collective fail; those left out are dead or stuck.

        Not by step: one death fails the statistics on some ranks and the broadcast, a step later, on others. One that
        notices only when another one, done with waiting, has gone, goes by what that one has found.
        """
        keys = {rank: f"failed/{rank}" for rank in self._ranks}
        self._store.set(keys[self._rank], str(self._store.add("failed/count", 1)))
        # One that has no connection to the dead rank sees its own collective fail only when the time is up.
        timed_out_seconds = self._timeout.total_seconds() + _VERDICT_SECONDS
        deadline = time.monotonic() + min(_LAST_WORDS_SECONDS, timed_out_seconds)
        while True:
            alive = [rank for rank, key in keys.items() if self._store.check([key])]
            if len(alive) == len(keys) or time.monotonic() > deadline:
                break
            if self._store.check([_MISSING_KEY]):
                missing = self._read_missing()
                return [rank for rank in self._ranks if rank == self._rank or rank not in missing]
            time.sleep(0.05)
        self._store.set(_MISSING_KEY, json.dumps([rank for rank in self._ranks if rank not in alive]))
        return alive

    def leave(self, *, failed: bool) -> None:
        """Leave word that this rank takes no further part: it has come to its end, or ``failed`` by itself."""
        if self._left:
            return
        self._left = True
        with contextlib.suppress(RuntimeError):  # the rank that hosts the store has gone first
            self._store.set(f"left/{self._rank}", _FAILED if failed else _ENDED)

    def blame(self, missing: Sequence[int]) -> tuple[list[int], str]:
        """Which of the ``missing`` ranks are at fault, and what they did.

        One that failed by itself comes before those that are dead or stuck, perhaps on its account; one that came to
        its end is at fault only if there is no other.
        """
        words = [self._word(rank) for rank in missing]
        worst = min(words, key=list(_DEEDS).index)
        return [rank for rank, word in zip(missing, words, strict=True) if word == worst], _DEEDS[worst]

    def last_survivor(self) -> int:
        """Once all are: the rank that saw the collective fail last, hence probably the one that was late for it."""
        places = {rank: self._read(f"failed/{rank}") for rank in self._ranks}
        return max(self._ranks, key=lambda rank: places[rank] if isinstance(places[rank], int) else 0)

    def _judge(self, call: str) -> dict[str, Any] | None:
        keys = [f"{call}/{rank}" for rank in self._ranks]
        if not self._arrived(keys):
            missing = [rank for rank, key in zip(self._ranks, keys, strict=True) if not self._store.check([key])]
            seconds = self._timeout.total_seconds()
            return {"rank": missing[0], "reason": f"ranks {missing} did not take part within {seconds:g} s"}
        given: dict[int, Facts] = {}
        for rank, key in zip(self._ranks, keys, strict=True):
            try:
                given[rank] = self._read_facts(key)
            except AgreementError as error:
                return {"rank": rank, "reason": error.reason}
        reference = _most_common(given)
        for rank, facts in given.items():
            reason = facts.get("error") or first_difference(given[reference], facts, reference, rank)
            if reason:
                return {"rank": rank, "reason": reason}
        return None

    def _verdict_arrived(self, call: str, verdict_key: str) -> bool:
        # The first rank may have come later than this one, and waits for the others from then on.
        if not self._arrived([f"{call}/{self._ranks[0]}"]):
            return False
        return self._arrived([verdict_key], self._timeout + timedelta(seconds=_VERDICT_SECONDS))

    def _arrived(self, keys: list[str], timeout: timedelta | None = None) -> bool:
        try:
            self._store.wait(keys, self._timeout if timeout is None else timeout)
        except RuntimeError:  # each kind of store says by another error that the time is up
            return self._store.check(keys)
        return True

    def _read_facts(self, key: str) -> Facts:
        try:
            facts = self._read(key)
        except (ValueError, RecursionError) as error:
            raise AgreementError(f"the text under {key!r} is not JSON: {error}") from None
        if not isinstance(facts, dict):
            raise AgreementError(f"the text under {key!r} is no JSON object")
        return facts

    def _read_verdict(self, key: str) -> dict[str, Any] | None:
        verdict = None if self._store.get(key) == b"null" else self._read_facts(key)
        if verdict is None:
            return None
        if verdict.get("rank") not in self._ranks or not isinstance(verdict.get("reason"), str):
            raise AgreementError(f"the text under {key!r} is no verdict: {verdict}", rank=self._ranks[0])
        return dict(verdict)

    def _word(self, rank: int) -> str:
        """What ``rank`` said when it left; empty if it has not."""
        key = f"left/{rank}"
        if not self._store.check([key]):
            return ""
        return _FAILED if self._store.get(key) == _FAILED.encode() else _ENDED

    def _read_missing(self) -> list[int]:
        missing = self._read(_MISSING_KEY)
        return [rank for rank in self._ranks if isinstance(missing, list) and rank in missing]

    def _read(self, key: str) -> Any:
        text = self._store.get(key)
        if len(text) > _MAX_TEXT_BYTES:
            raise AgreementError(f"the text under {key!r} has {len(text)} bytes; at most {_MAX_TEXT_BYTES} are read")
        return json.loads(text)


def _most_common(given: Mapping[int, Facts]) -> int:
    """The first of the ranks whose facts most others share."""
    texts = {rank: json.dumps(facts, sort_keys=True) for rank, facts in given.items()}
    counts = Counter(texts.values())
    return max(given, key=lambda rank: counts[texts[rank]])


def first_difference(reference: Facts, facts: Facts, reference_rank: int, rank: int) -> str | None:
    """The first field, in the order of the reference, whose value differs; None if all are equal."""
    for field in [*reference, *(key for key in facts if key not in reference)]:
        ours, theirs = reference.get(field), facts.get(field)
        if ours == theirs:
            continue
        if isinstance(ours, list) and isinstance(theirs, list):
            return _list_difference(field, ours, theirs, reference_rank, rank)
        return f"{field} differs: {theirs!r} on rank {rank}, {ours!r} on rank {reference_rank}; make them equal"
    return None


def _list_difference(field: str, ours: list[Any], theirs: list[Any], reference_rank: int, rank: int) -> str:
    for position, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        if our != their:
            return (
                f"{field}[{position}] differs: {their!r} on rank {rank}, {our!r} on rank {reference_rank}; "
                "make them equal"
            )
    return (
        f"{field} differs in length: {len(theirs)} on rank {rank}, {len(ours)} on rank {reference_rank}; "
        "make them equal"
    )
