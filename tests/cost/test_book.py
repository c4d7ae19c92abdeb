"""Samples on a rank, their fold over ranks, and costs at the batch at hand."""

from __future__ import annotations

import math

import pytest
import torch

from gradckpt_dist.cost.agreed import Costs
from gradckpt_dist.cost.book import RECALLED, SAMPLES, CostBook
from gradckpt_dist.cost.clock import DeviceClock
from gradckpt_dist.storage.ledger import Measurement

KINDS = (0, 1, 0)
NAMES = ("keep", "recompute", "offload")


def _book() -> CostBook:
    return CostBook(KINDS, NAMES, DeviceClock(torch.device("cpu")))


def _measurement(held: int, peak: int) -> Measurement:
    return Measurement(keep_bytes=(0,), recompute_bytes=(0,), stored_bytes=(held,), held_bytes=held, peak_bytes=peak)


def _folded(*books: CostBook) -> Costs:
    costs = Costs(KINDS, NAMES)
    vectors = [book.take_maxima() for book in books]
    assert {len(vector) for vector in vectors} == {costs.size}
    costs.update([max(values) for values in zip(*vectors, strict=True)])
    return costs


def _step(book: CostBook, *calls: tuple[int, int]) -> None:
    for index, tokens in calls:
        book.saw_call(index, tokens)
    book.end_forward()
    book.end_step()


def test_seconds_are_medians_of_differences_to_keep_in_the_same_probe() -> None:
    book = _book()
    for slow in (1.0, 1.0, 50.0, 1.0, 3.0):
        book.note_runs(0, 10, {"keep": (0.0, 2.0 * slow), "recompute": (5.0, 5.0 + 3.0 * slow)})
    book.note_bytes(2, "offload", 10, _measurement(0, 0))
    _step(book, (0, 10), (2, 20))
    costs = _folded(book)
    assert costs.of(2, "keep").seconds == pytest.approx(0.2)
    assert costs.of(2, "recompute").seconds == pytest.approx(0.3)
    assert costs.of(2, "recompute").extra_seconds == pytest.approx(0.1)
    assert costs.of(1, "recompute").seconds is None


def test_the_slowest_rank_and_the_most_bytes_count() -> None:
    books = [_book(), _book(), _book()]
    for number, book in enumerate(books[:2]):
        book.note_bytes(0, "recompute", 8, _measurement(80 + 8 * number, 160))
        book.note_runs(0, 8, {"keep": (0.0, 1.0), "recompute": (0.0, 1.8 + 0.8 * number)})
        _step(book, (0, 8 * (number + 1)))
    costs = _folded(*books)
    assert costs.of(0, "recompute").extra_seconds == pytest.approx(0.2)
    assert costs.held_bytes(0, "recompute") == 16 * 11
    assert costs.working_set_bytes(0, "recompute") == 16 * 10


def test_costs_scale_with_the_tokens_of_a_step_a_forward_and_a_call() -> None:
    book = _book()
    book.note_bytes(0, "recompute", 10, _measurement(100, 400))
    book.note_runs(0, 10, {"keep": (0.0, 1.0), "recompute": (0.0, 2.0)})
    for tokens in (10, 4):
        book.saw_call(0, tokens)
        book.saw_call(0, tokens)
        book.end_forward()
    book.end_step()
    costs = _folded(book)
    assert (costs.step_tokens[0], costs.forward_tokens[0], costs.call_tokens[0]) == (28, 20, 10)
    assert costs.extra_seconds(0, "recompute") == pytest.approx(2.8)
    assert costs.held_bytes(0, "recompute") == 200
    assert costs.working_set_bytes(0, "recompute") == 300
    assert costs.probe_bytes(0) == 400
    assert costs.probe_bytes(1) is None


def test_forwards_in_flight_hold_together() -> None:
    book = _book()
    book.note_bytes(0, "recompute", 10, _measurement(100, 400))
    book.note_runs(0, 10, {"keep": (0.0, 1.0), "recompute": (0.0, 2.0)})
    _step(book, (0, 10))
    costs = Costs(KINDS, NAMES)
    costs.update(book.take_maxima(forwards_in_flight=3))
    assert costs.held_bytes(0, "recompute") == 300
    assert costs.working_set_bytes(0, "recompute") == 300
    assert costs.extra_seconds(0, "recompute") == pytest.approx(1.0)


def test_another_shape_is_measured_anew_and_the_largest_of_the_window_counts() -> None:
    book = _book()
    book.note_bytes(0, "keep", 10, _measurement(100, 100))
    book.note_runs(0, 10, {"keep": (0.0, 1.0)})
    assert book.knows(2, "keep", 20)
    assert not book.knows(0, "keep", 21)
    assert not book.knows(0, "keep", 5)
    assert not book.knows(1, "keep", 10)
    _step(book, (0, 10))
    costs = _folded(book)
    assert costs.of(0, "keep").seconds == pytest.approx(0.1)
    book.note_bytes(0, "keep", 30, _measurement(600, 600))
    book.note_runs(0, 30, {"keep": (0.0, 6.0)})
    _step(book, (0, 30))
    _step(book, (0, 12))
    costs.update(book.take_maxima())
    assert costs.of(0, "keep").seconds == pytest.approx(0.2)
    assert costs.held_bytes(0, "keep") == 600
    _step(book, (0, 12))
    costs.update(book.take_maxima())
    assert costs.held_bytes(0, "keep") == 240


def _agreed_before() -> Costs:
    book = _book()
    for name, held in (("keep", 100), ("recompute", 20)):
        book.note_bytes(0, name, 10, _measurement(held, 100))
    for _ in range(RECALLED):
        book.note_runs(0, 10, {"keep": (0.0, 1.0), "recompute": (0.0, 1.5)})
    book.refuse(1, "offload")
    _step(book, (0, 10), (1, 10), (2, 10))
    return _folded(book)


def test_after_a_restart_a_single_sample_does_not_count_for_all_of_before() -> None:
    costs = _agreed_before()
    book = _book()
    book.note_runs(0, 10, {"keep": (0.0, 7.0), "recompute": (0.0, 99.0)})
    book.restart(costs)
    assert not book.knows(0, "recompute", 10), "it has not run in this process"
    for name, held in (("keep", 200), ("recompute", 40)):
        book.note_bytes(0, name, 12, _measurement(held, 200))
    assert book.knows(0, "recompute", 10)
    for sample in range(2 * RECALLED):
        book.note_runs(0, 10, {"keep": (0.0, 2.0), "recompute": (0.0, 9.0)})
        costs.update(book.take_maxima())
        old = sample < RECALLED - 1
        if sample != RECALLED - 1:
            assert costs.of(0, "recompute").extra_seconds == pytest.approx(0.05 if old else 0.7)
            assert costs.of(0, "keep").seconds == pytest.approx(0.1 if old else 0.2)
    assert costs.of(0, "keep").held_bytes == pytest.approx(200 / 12)


def test_times_of_before_a_restart_are_forgotten_where_calls_have_another_size() -> None:
    costs = _agreed_before()
    book = _book()
    book.restart(costs)
    for name in ("keep", "recompute"):
        book.note_bytes(2, name, 40, _measurement(400, 400))
    book.note_runs(2, 40, {"keep": (0.0, 8.0), "recompute": (0.0, 20.0)})
    costs.update(book.take_maxima())
    assert costs.of(0, "recompute").extra_seconds == pytest.approx(0.3)


def test_a_restart_knows_nothing_of_what_was_not_measured() -> None:
    costs = _agreed_before()
    book = _book()
    book.restart(costs)
    assert not book.refuses(1, "offload"), "another process may be able to"
    costs.update(book.take_maxima())
    assert costs.of(1, "offload").refused
    assert costs.of(0, "offload").seconds is costs.of(1, "keep").seconds is None
    assert costs.of(0, "recompute").extra_seconds == pytest.approx(0.05)


def test_what_is_unknown_or_refused_is_infinitely_dear() -> None:
    book = _book()
    book.note_runs(0, 1, {"keep": (0.0, 1.0), "recompute": (0.0, 2.0)})
    book.refuse(2, "offload")
    _step(book, (0, 1))
    costs = _folded(book, _book())
    assert costs.extra_seconds(0, "recompute") == math.inf, "its bytes are unknown"
    assert costs.extra_seconds(0, "offload") == costs.extra_seconds(1, "keep") == math.inf
    assert costs.of(0, "offload").refused
    assert book.refuses(0, "offload")
    assert book.knows(0, "offload", 1)


def test_a_faulty_ranks_numbers_are_left_out() -> None:
    book = _book()
    book.note_bytes(0, "keep", 1, _measurement(7, 7))
    _step(book, (0, 1))
    costs = _folded(book)
    for value in (math.nan, math.inf):
        costs.update([value] * costs.size)
    assert costs.held_bytes(0, "keep") == 7
    assert costs.of(0, "keep").held_bytes == 7


def test_marks_that_the_device_has_not_come_to_wait_for_the_next_window() -> None:
    class Late(DeviceClock):
        ready = False

        def seconds(self, start: float, end: float) -> float | None:
            return end - start if self.ready else None

    clock = Late(torch.device("cpu"))
    book = CostBook(KINDS, NAMES, clock)
    for _ in range(SAMPLES + 5):
        book.note_runs(0, 1, {"keep": (0.0, 1.0)})
    assert _folded(book).of(0, "keep").seconds is None
    clock.ready = True
    assert _folded(book).of(0, "keep").seconds == 1.0


def test_the_table_serves_what_is_measured_and_keeps_and_recomputes_the_rest() -> None:
    book = _book()
    marks = {"keep": (0.0, 10.0), "recompute": (0.0, 20.0), "offload": (0.0, 15.0)}
    book.note_runs(0, 10, marks)
    for name, (held, peak) in {"keep": (400, 400), "recompute": (100, 400), "offload": (0, 400)}.items():
        book.note_bytes(0, name, 10, _measurement(held, peak))
    _step(book, (0, 10), (1, 10), (2, 20))
    measured = {"keep": (400, 600, 800), "recompute": (100, 200, 200)}
    table = _folded(book).table({"offload": (0.5, 0.0, math.inf)}, measured, fixed_bytes=7)
    inf = math.inf
    assert table.extra_seconds.tolist() == [[0, 10, 5], [0, 10, inf], [0, 20, inf]]
    assert table.held_bytes.tolist() == [[400, 100, 0], [600, 200, 0], [800, 200, 0]]
    assert table.working_set_bytes.tolist() == [[0, 300, 400], [0, 400, 0], [0, 600, 800]]
    assert table.squared_error.tolist() == [[0, 0, 0.5], [0, 0, 0], [0, 0, 0]]
    assert table.fixed_bytes == 7
