"""``gradckpt bench scale``: the object that tools read, and the model behind its simulated rows."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import run_command

from gradckpt_dist.agreement.wire import message_bytes
from gradckpt_dist.bench import scale
from gradckpt_dist.bench.scale_model import Network, sent_bytes, simulate

CALM = Network(message_tail=1e9, step_tail=1e9)


@pytest.mark.bench
def test_quick_run_prints_one_object(tmp_path: Path) -> None:
    output = tmp_path / "scale.json"
    command = [sys.executable, "-m", "gradckpt_dist", "bench", "scale", "--quick", "--json", "--output", str(output)]
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads(output.read_text())
    rows = result["rows"]
    assert {(row["ranks"], row["simulated"]) for row in rows} >= {(2, False), (4, False), (16_384, True)}
    assert {row["blocks"] for row in rows} == {126}
    assert {row["collectives"] for row in rows} == {3}
    assert len({row["payload_bytes"] for row in rows}) == 1  # the real ones counted, the simulated ones assumed
    assert all(0 < row["wire_bytes"] <= 64 * 1024 for row in rows)
    assert all(0 < row["exposed_seconds"] <= row["worst_exposed_seconds"] for row in rows)
    real = [row for row in rows if not row["simulated"]]
    assert all(row["cpu_seconds"] > 0 for row in real)
    assert result["host_seconds"] in [row["exposed_seconds"] for row in real]


@pytest.mark.parametrize(("cores", "seconds"), [(1, 1.0), (2, 1.0), (4, 1.5), (6, 1.5), (64, 3.0)])
def test_the_hosts_seconds_are_the_median_of_ranks_with_a_core_each(
    cores: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    rows = [{"ranks": ranks, "exposed_seconds": found} for ranks, found in ((2, 1.0), (4, 1.5), (8, 3.0))]
    assert scale._host_seconds(rows) == seconds


def test_a_decision_on_126_blocks_sends_64_kib_at_most() -> None:
    sums, maxima = scale._vectors()
    payload = 8 * (len(sums) + len(maxima) + 4)
    assert sent_bytes(payload, message_bytes(scale.BLOCKS), 16_384) <= 64 * 1024


@pytest.mark.parametrize(
    ("algorithm", "ranks", "hops"), [("tree", 2, 3), ("tree", 1024, 30), ("ring", 2, 3), ("ring", 1024, 3069)]
)
def test_without_stragglers_a_decision_takes_its_messages(algorithm: str, ranks: int, hops: int) -> None:
    network = replace(CALM, bytes_per_second=1e30)
    messages = (("reduce", 1000), ("broadcast", 100))
    waits = simulate(
        algorithm,
        ranks,
        messages,
        network=network,
        step_seconds=1.0,
        decisions=2,
        generator=np.random.default_rng(0),
    )
    expected = 2 * network.base_seconds + hops * network.latency_seconds
    assert waits.collective_seconds == pytest.approx([expected] * 2, rel=1e-6)
    assert waits.exposed_seconds == pytest.approx([0.0] * 2)


def test_what_takes_longer_than_a_step_is_exposed() -> None:
    waits = simulate(
        "ring",
        16,
        (("reduce", 10**9),),
        network=replace(CALM, bytes_per_second=1e9),
        step_seconds=1.0,
        decisions=1,
        generator=np.random.default_rng(0),
    )
    # 2 x 15/16 x 1 s on the wire; the next step begins late by the least delay.
    assert waits.exposed_seconds[0] == pytest.approx(0.875, abs=2e-3)


def test_bytes_sent_are_bounded_whatever_the_number_of_ranks() -> None:
    assert sent_bytes(1000, 100, 2) == 1100
    assert [sent_bytes(1000, 0, 2**power) for power in (1, 2, 10, 20)] == [1000, 1500, 1999, 2000]
