"""Runs chaos: ``driver.py --runs 300 --seed 0``. One object of counts on stdout, one line for each run that went wrong.

A parent that has imported everything, and done nothing with it, forks the ranks of each run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import BY_OWN_ACCOUNT, DEADLY, HARMLESS, Plan, draw
from rank import COMPLETED, FAILED, STOPPED, run

AT_ONCE = 4
"""Most of a run's time goes by in waiting for a rank that is late or dead."""
HANG_SECONDS = 90.0


@dataclass
class _Ranks:
    plan: Plan
    pids: dict[int, int]
    """By process, its rank."""
    statuses: dict[int, int]
    deadline: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How one run went."""

    outcome: str
    decisions: int
    problems: list[str]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started, counts, by_fault = time.monotonic(), Counter(), {}
    decisions = 0
    for plan, verdict in _verdicts(range(arguments.seed, arguments.seed + arguments.runs)):
        counts[verdict.outcome] += 1
        decisions += verdict.decisions
        by_fault.setdefault(plan.fault, Counter())[verdict.outcome] += 1
        for problem in verdict.problems:
            counts[problem.split(":")[0]] += 1
            print(f"seed {plan.seed}: {problem}; {json.dumps(plan.plain())}", file=sys.stderr, flush=True)
    faulty = [name for name in ("hang", "wrong gradient", "masks differ", "unexpected") if counts[name]]
    result = {"runs": arguments.runs, "decisions": decisions, "seconds": round(time.monotonic() - started), **counts}
    zeros = dict.fromkeys(("hang", "wrong gradient", "masks differ", "unexpected"), 0)
    print(json.dumps(zeros | result | {"faults": {name: dict(found) for name, found in by_fault.items()}}, indent=1))
    return 1 if faulty else 0


def _verdicts(seeds: Any) -> Iterator[tuple[Plan, Verdict]]:
    with tempfile.TemporaryDirectory() as folder:
        waiting = [draw(seed, Path(folder, str(seed))) for seed in reversed(seeds)]
        running: list[_Ranks] = []
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                running.append(_start(waiting.pop()))
            for ranks in list(running):
                if _ended(ranks):
                    running.remove(ranks)
                    yield ranks.plan, judge(ranks.plan, ranks.statuses)
            time.sleep(0.01)


def _start(plan: Plan) -> _Ranks:
    Path(plan.folder).mkdir()
    sys.stdout.flush()
    pids = {}
    for rank in range(plan.ranks):
        pid = os.fork()
        if pid == 0:
            output = os.open(f"{plan.folder}/output{rank}", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            run(plan, rank)
        pids[pid] = rank
    return _Ranks(plan, pids, {}, time.monotonic() + HANG_SECONDS)


def _ended(ranks: _Ranks) -> bool:
    """Whether all ranks have; those that take too long are killed and count as hung."""
    hung = time.monotonic() > ranks.deadline
    for pid, rank in list(ranks.pids.items()):
        if hung:
            os.kill(pid, signal.SIGKILL)
        ended, status = os.waitpid(pid, 0 if hung else os.WNOHANG)
        if ended:
            del ranks.pids[pid]
            ranks.statuses[rank] = 1000 if hung else os.waitstatus_to_exitcode(status)
    return not ranks.pids


def judge(plan: Plan, statuses: dict[int, int]) -> Verdict:
    """What the ranks wrote down, held against what may be."""
    records = {rank: _lines(Path(plan.folder, f"rank{rank}.jsonl")) for rank in statuses}
    problems = [f"hang: rank {rank}" for rank, status in statuses.items() if status == 1000]
    masks: dict[int, set[tuple[int, str]]] = {}
    for rank, lines in records.items():
        steps = [line for line in lines if "exact" in line]
        problems += [f"wrong gradient: rank {rank}, step {line['step']}" for line in steps if not line["exact"]]
        for line in steps:
            masks.setdefault(line["step"], set()).add((line["epoch"], line["digest"]))
    problems += [f"masks differ: step {step}: {sorted(found)}" for step, found in masks.items() if len(found) > 1]
    for rank, status in statuses.items():
        if status != 1000 and (fault := _unexpected(plan, rank, statuses, records[rank])):
            problems.append(f"unexpected: rank {rank}: {fault}")
    outcome = "completed" if set(statuses.values()) == {COMPLETED} else "stopped with an error"
    decisions = max((epoch for found in masks.values() for epoch, _ in found), default=0)
    return Verdict(outcome=outcome, decisions=decisions, problems=problems)


def _unexpected(plan: Plan, rank: int, statuses: dict[int, int], lines: list[dict[str, Any]]) -> str:
    last, status = lines[-1] if lines else {}, statuses[rank]
    if status == COMPLETED:
        return ""
    if plan.fault in DEADLY and rank == plan.victim:
        return "" if status in {-signal.SIGKILL, -signal.SIGTERM, STOPPED} else f"ended with {status}, {last}"
    if plan.fault in HARMLESS or status not in {STOPPED, FAILED}:
        return f"ended with {status}: {last.get('error') or last.get('failure')}"
    if status == FAILED:
        framework = plan.form != "local" and "gradckpt_dist/" not in last.get("failure", "")[-600:]
        return "" if framework else f"failed: {last.get('failure')}"
    named = last.get("rank") is not None and last.get("at", -1) >= 0 and last.get("error")
    return "" if named and _blames(last, plan, rank) else f"the error names the wrong rank, or none: {last}"


def _blames(error: dict[str, Any], plan: Plan, rank: int) -> bool:
    """Whether the victim is named and nobody else, as far as this rank can know."""
    found = re.match(r"ranks \[([\d, ]+)\]", error["error"])
    named = {int(number) for number in found[1].split(",")} if found else {error["rank"]}
    if plan.fault == "corrupt broadcast":  # found where it arrives, and then missed by those that did not get so far
        return named <= set(range(plan.ranks)) and (0 in named or rank in named)
    if plan.fault in BY_OWN_ACCOUNT and (rank == plan.victim or plan.ranks == 2):
        return True
    return named == {plan.victim}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
