"""Comparing facts over ranks, each rank a thread on one store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from gradckpt_dist import AgreementError
from gradckpt_dist.agreement import roll_call
from gradckpt_dist.agreement.roll_call import RollCall, first_difference

RANKS = (4, 5, 7)
SECONDS = 20.0


def _all(
    call: Callable[[RollCall, int], Any], *, ranks: tuple[int, ...] = RANKS, seconds: float = SECONDS
) -> list[Any]:
    """What ``call`` gave or raised on each of ``ranks``, the domain being ``RANKS``."""
    store = HashStore()

    def one(rank: int) -> Any:
        try:
            return call(RollCall(store, rank, RANKS, seconds), rank)
        except AgreementError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def _compare(facts: Mapping[int, Mapping[str, Any]], step: int = 0, **settings: Any) -> list[AgreementError]:
    outcomes = _all(lambda calls, rank: calls.compare(facts[rank], step), ranks=tuple(facts), **settings)
    assert all(isinstance(outcome, AgreementError) for outcome in outcomes), outcomes
    return outcomes


def test_equal_facts_are_agreed_call_after_call() -> None:
    facts = {"error": None, "version": "1", "blocks": ["a", "b"], "share": 0.1, "nested": {"value": None}}

    def thrice(calls: RollCall, rank: int) -> None:
        for step in range(3):
            calls.compare(facts | {"step": step}, step)

    assert _all(thrice) == [None, None, None]


def test_first_rank_and_field_that_differ_are_named_on_every_rank() -> None:
    same = {"version": "1", "interval": 50, "seed": 0}
    facts = {4: same, 5: same | {"interval": 20, "seed": 1}, 7: same | {"version": "2"}}
    for error in _compare(facts, step=9):
        assert (error.rank, error.step) == (5, 9)
        assert error.reason == "interval differs: 20 on rank 5, 50 on rank 4; make them equal"


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (["a", "c", "d"], "blocks[1] differs: 'c' on rank 7, 'b' on rank 4; make them equal"),
        (["a"], "blocks differs in length: 1 on rank 7, 2 on rank 4; make them equal"),
        (["a", "b", "c"], "blocks differs in length: 3 on rank 7, 2 on rank 4; make them equal"),
        (None, "blocks differs: None on rank 7, ['a', 'b'] on rank 4; make them equal"),
    ],
)
def test_lists_name_the_position(theirs: Any, reason: str) -> None:
    same = {"blocks": ["a", "b"]}
    for error in _compare({4: same, 5: same, 7: {"blocks": theirs}}):
        assert (error.rank, error.reason) == (7, reason)


def test_fields_of_one_side_only_are_differences() -> None:
    assert first_difference({"a": 1}, {"a": 1}, 0, 1) is None
    assert (
        first_difference({"a": 1}, {"a": 1, "b": 2}, 0, 1) == "b differs: 2 on rank 1, None on rank 0; make them equal"
    )
    assert first_difference({"a": 1}, {}, 0, 1) == "a differs: None on rank 1, 1 on rank 0; make them equal"


def test_facts_are_held_against_what_most_ranks_gave() -> None:
    for error in _compare({4: {"step": 3}, 5: {"step": 6}, 7: {"step": 6}}):
        assert error.rank == 4
        assert error.reason == "step differs: 3 on rank 4, 6 on rank 5; make them equal"


@pytest.mark.parametrize(
    ("left", "missing", "faulty"),
    [
        ({4: False}, [4, 5], ([5], "did not answer")),
        ({4: True}, [4, 5], ([4], "had stopped with an error")),
        ({4: False, 5: False}, [4, 5], ([4, 5], "had ended")),
        ({5: False}, [5], ([5], "had ended")),
        ({}, [4, 5], ([4, 5], "did not answer")),
    ],
)
def test_of_the_missing_those_are_blamed_that_did_not_end_in_order(
    left: dict[int, bool], missing: list[int], faulty: tuple[list[int], str]
) -> None:
    store = HashStore()
    for rank, failed in left.items():
        leaving = RollCall(store, rank, RANKS, SECONDS)
        leaving.leave(failed=failed)
        leaving.leave(failed=not failed)  # the first word counts
    assert RollCall(store, 7, RANKS, SECONDS).blame(missing) == faulty


@pytest.mark.parametrize("failed", RANKS)
def test_an_error_on_one_rank_reaches_all(failed: int) -> None:
    facts = {rank: {"error": "ConfigError: x" if rank == failed else None, "seed": 0} for rank in RANKS}
    for error in _compare(facts):
        assert (error.rank, error.reason) == (failed, "ConfigError: x")


@pytest.mark.parametrize("missing", RANKS)
def test_a_rank_that_does_not_come_is_named_by_all_others(missing: int) -> None:
    came = {rank: {"seed": 0} for rank in RANKS if rank != missing}
    started = time.monotonic()
    errors = _compare(came, seconds=0.5)
    assert time.monotonic() - started < 15
    assert {error.rank for error in errors} == {missing}


def test_a_rank_that_comes_late_but_in_time_blames_nobody_else() -> None:
    def late(calls: RollCall, rank: int) -> None:
        if rank == RANKS[0]:
            time.sleep(0.7)
        calls.compare({"seed": 0}, 0)

    errors = _all(late, ranks=RANKS[:2], seconds=1.0)
    assert [error.rank for error in errors] == [7, 7]


@pytest.mark.parametrize("talker", RANKS)
def test_a_text_that_is_too_long_is_refused_on_every_rank(talker: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "_MAX_TEXT_BYTES", 500)
    started = time.monotonic()
    errors = _compare({rank: {"blocks": "x" * (600 if rank == talker else 10)} for rank in RANKS})
    assert time.monotonic() - started < SECONDS / 2
    for error in errors:
        assert error.rank == talker
        assert "at most 500 are read" in error.reason


@pytest.mark.parametrize("garbage", [b"{", b"[1]", b"null", b"\xff", b"[" * 100_000])
def test_a_text_that_is_no_facts_is_refused_on_every_rank(garbage: bytes) -> None:
    class Garbled(RollCall):
        """A rank whose text is replaced on its way to the store."""

        def _confer(self, call: str, facts: Mapping[str, Any], step: int) -> Any:
            self._store.set(f"{call}/{self._rank}", garbage)
            assert self._arrived([f"{call}/verdict"])
            return self._read(f"{call}/verdict")

    def call(calls: RollCall, rank: int) -> None:
        if rank == 7:
            calls.__class__ = Garbled
        calls.compare({"seed": 0}, 0)

    for error in _all(call):
        assert error.rank == 7
        assert "JSON" in error.reason


@pytest.mark.parametrize("verdict", [b"{", b"[1]", b'{"rank": 9, "reason": "x"}', b'{"rank": 4}', b"\x80\x04N."])
def test_a_verdict_that_is_none_is_refused(verdict: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    read = RollCall._read_verdict

    def garbled(calls: RollCall, key: str) -> Any:
        calls._store.set(key, verdict)
        return read(calls, key)

    monkeypatch.setattr(RollCall, "_read_verdict", garbled)
    for error in _all(lambda calls, rank: calls.compare({"seed": 0}, 0)):
        assert isinstance(error, AgreementError)


def test_all_are_here_only_if_all_come_at_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "JOINED_SECONDS", 0.5)
    assert _all(lambda calls, rank: [calls.all_here(step) for step in (3, 3, 5)]) == [[True] * 3] * 3
    assert _all(lambda calls, rank: calls.all_here(3 if rank != 5 else 4)) == [False] * 3
    assert _all(lambda calls, rank: calls.all_here(3) if rank != 5 else None) == [False, None, False]


def test_who_was_left_alone_once_waits_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "JOINED_SECONDS", 0.5)

    def alone(calls: RollCall, rank: int) -> tuple[list[bool], float]:
        first = calls.all_here(1)
        started = time.monotonic()
        return [first, *(calls.all_here(step) for step in range(2, 100))], time.monotonic() - started

    ((answers, seconds),) = _all(alone, ranks=RANKS[:1])
    assert not any(answers)
    assert seconds < 10


def test_survivors_are_those_who_saw_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "_LAST_WORDS_SECONDS", 0.5)
    assert _all(lambda calls, rank: calls.survivors() if rank != 5 else None) == [[4, 7], None, [4, 7]]


def test_a_rank_that_notices_later_goes_by_what_the_others_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "_LAST_WORDS_SECONDS", 4.0)

    def notice(calls: RollCall, rank: int) -> tuple[list[int], float] | None:
        if rank == 5:
            return None
        time.sleep(6.0 * (rank == 7))
        started = time.monotonic()
        return calls.survivors(), time.monotonic() - started

    first, _, late = _all(notice)
    assert first is not None
    assert late is not None
    assert (first[0], late[0]) == ([4], [4, 7])
    assert late[1] < 2


def test_the_last_to_see_a_failure_is_known_to_all() -> None:
    def fail(calls: RollCall, rank: int) -> tuple[list[int], int]:
        time.sleep(1.0 * (rank == 5))
        return calls.survivors(), calls.last_survivor()

    assert _all(fail) == [(list(RANKS), 5)] * 3


def test_survivors_do_not_wait_once_all_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "_LAST_WORDS_SECONDS", 60.0)
    started = time.monotonic()
    assert _all(lambda calls, rank: calls.survivors()) == [list(RANKS)] * 3
    assert time.monotonic() - started < 15
