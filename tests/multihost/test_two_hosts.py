"""torchrun on two hosts, which are network namespaces joined by a veth pair: all four ranks hold the same masks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import run_command

HERE = Path(__file__).parent
ADDRESSES = ("10.203.77.1", "10.203.77.2")
"""Inside the two namespaces only, which nothing else can reach."""
PORT = 29400


@contextmanager
def _hosts() -> Iterator[list[str]]:
    """Two namespaces that reach each other and nothing else, by an interface of another name on each."""
    names = [f"gradckpt{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "hosta0", "netns", names[0], "type", "veth", "peer", "name", "hostb0", "netns", names[1])
        for name, device, address in zip(names, ("hosta0", "hostb0"), ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            for link in (device, "lo"):
                _ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _why_not() -> str:
    """Why namespaces cannot be made here; empty if they can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "this needs Linux and iproute2's `ip`"
    try:
        with _hosts():
            return ""
    except PermissionError as error:
        return f"network namespaces are not allowed here ({error})"


@pytest.mark.slow
def test_four_ranks_on_two_hosts_hold_the_same_masks(tmp_path: Path) -> None:
    if reason := _why_not():
        pytest.skip(reason)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", "--rdzv-id=two-hosts"]
    script = [str(HERE / "multihost_script.py"), str(tmp_path)]
    with _hosts() as names:
        settings = [f"GLOO_SOCKET_IFNAME={device}" for device in ("hosta0", "hostb0")]
        # The machine's own name, by which torchrun looks for the store's host, is neither's.
        places = [[f"--local-addr={ADDRESSES[i]}", f"--rdzv-conf=is_host={1 - i}"] for i in range(2)]
        commands = [
            ["ip", "netns", "exec", name, "env", setting, *launch, *place, *script]
            for name, setting, place in zip(names, settings, places, strict=True)
        ]
        output = (tmp_path / "other").open("w")
        other = subprocess.Popen(commands[1], env=_environment(), stdout=output, stderr=output)
        try:
            done = run_command(commands[0], timeout_seconds=200, **_environment())
            assert done.returncode == 0, done.stderr
            assert other.wait(60) == 0
        finally:
            other.terminate()
            other.wait()
            output.close()
    records = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert [record["host"] for record in records] in ([0, 0, 1, 1], [1, 1, 0, 0])
    assert all(record["masks"] == records[0]["masks"] for record in records)
    assert records[0]["masks"][-1][0] >= 3
    assert len({digest for _, digest in records[0]["masks"]}) >= 2
    assert all(record["saved"] == records[0]["saved"] for record in records)


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(HERE.parent.parent), str(HERE.parent), str(HERE.parent.parent / "launch")])
    return dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
