"""``python -m gradckpt_dist run``: the script sees what it would see without us."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from support import INTERRUPTED, interruptible, run_command, run_torchrun

REPOSITORY = Path(__file__).parents[2]
MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(0.1)
    def forward(self, x):
        return x + self.dropout(self.down(torch.relu(self.up(x))))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

def train(model, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 16)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sibling.py").write_text(MODEL)
    settings = f"policy: threshold, memory_budget: 0.5, interval: 4, warmup_steps: 0, log_dir: {tmp_path / 'log'}"
    (tmp_path / "config.yaml").write_text(f"gradckpt: {{{settings}, log_level: debug}}\n")
    return tmp_path


def _script(folder: Path, text: str) -> Path:
    path = folder / "train.py"
    path.write_text(textwrap.dedent(text))
    return path


def _run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradckpt_dist", "run", "--config", str(folder / "config.yaml")]
    return run_command([*command, str(folder / "train.py"), *args])


def _plain(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return run_command([sys.executable, str(folder / "train.py"), *args])


def _decisions(folder: Path, name: str = "gradckpt.jsonl") -> list[dict[str, object]]:
    events = [json.loads(line) for line in (folder / "log" / name).read_text().splitlines()]
    return [event for event in events if event["event"] == "decision"]


def test_script_sees_its_own_arguments_path_and_main(folder: Path) -> None:
    _script(
        folder,
        """
        import json, pickle, sys
        import sibling
        class Here:
            pass
        pickle.loads(pickle.dumps(Here()))
        import __main__
        print(json.dumps([sys.argv, sys.path[0], __name__, __file__, __main__.Here is Here, len(sys.path)]))
        """,
    )
    plain, ours = (run(folder, "--lr", "1", "--config", "x", "-h") for run in (_plain, _run))
    assert plain.returncode == ours.returncode == 0
    assert ours.stdout == plain.stdout
    assert "without a model to act on" in ours.stderr


@pytest.mark.parametrize("name", ["train", pytest.param("package", marks=pytest.mark.slow)])
def test_module_sees_what_python_m_shows(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
        import sys
        import sibling
        def inner():
            print(sys.argv, sys.path[0], __name__, __file__, __spec__.name)
            raise ValueError("broken")
        inner()
        """
    _script(folder, source)
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").touch()
    (folder / "package" / "__main__.py").write_text((folder / "train.py").read_text())
    monkeypatch.chdir(folder)
    python_path = {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    plain = run_command([sys.executable, "-m", name, "--lr", "-m"], **python_path)
    ours = run_command([sys.executable, "-m", "gradckpt_dist", "run", "-m", name, "--lr", "-m"], **python_path)
    assert ours.returncode == plain.returncode == 1
    assert ours.stdout == plain.stdout
    assert ours.stderr.splitlines()[1:] == plain.stderr.splitlines()[-len(ours.stderr.splitlines()) + 1 :]
    assert "runpy" not in ours.stderr


def test_training_is_bitwise_and_decides(folder: Path) -> None:
    _script(
        folder,
        """
        import torch, sibling
        torch.manual_seed(0)
        print(sibling.train(sibling.Model(), 14))
        """,
    )
    plain, ours = _plain(folder), _run(folder)
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == plain.stdout
    decisions = _decisions(folder)
    assert len(decisions) >= 2
    assert set(decisions[-1]["mask"]) == {"keep", "recompute"}  # type: ignore[call-overload]


def test_all_forwards_from_the_very_first_are_under_the_mask(folder: Path) -> None:
    _script(
        folder,
        """
        import torch, sibling
        calls = 0
        def count(module, args):
            global calls
            calls += 1
        model = sibling.Model()
        up = model.blocks[0].up
        up.register_forward_pre_hook(count)
        sibling.train(model, 1)
        print(calls)
        """,
    )
    assert _plain(folder).stdout == "1\n"
    assert _run(folder).stdout == "2\n"


def test_frozen_evaluation_first_and_enable_in_the_script(folder: Path) -> None:
    _script(
        folder,
        """
        import torch, sibling, gradckpt_dist
        model = sibling.Model()
        with torch.no_grad():
            model(torch.randn(2, 16))
        engine = gradckpt_dist.enable(model, {"policy": "static", "every_n": 2})
        sibling.train(model, 3)
        print(engine.stats()["recomputes"])
        """,
    )
    ours = _run(folder)
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == "[3, 0, 3, 0]\n"


@pytest.mark.parametrize(
    "ending", ["sys.exit(7)", "sys.exit('a message')", "raise ValueError('broken')", "raise KeyboardInterrupt", "1 +"]
)
def test_exit_codes_and_tracebacks_are_those_of_the_script(folder: Path, ending: str) -> None:
    _script(folder, f"import sys\ndef inner():\n    {ending}\ninner()\n")
    plain, ours = _plain(folder), _run(folder)
    assert ours.returncode == plain.returncode
    assert ours.stderr == plain.stderr


def test_interrupt_reaches_the_script(folder: Path) -> None:
    script = _script(folder, INTERRUPTED)
    command = [sys.executable, "-m", "gradckpt_dist", "run", str(script)]
    with interruptible(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert output == "cleaned up\n"
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    assert "gradckpt_dist" not in errors


def test_spawned_data_loader_workers_find_main(folder: Path) -> None:
    _script(
        folder,
        """
        import torch
        from torch.utils.data import DataLoader, Dataset
        class Numbers(Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, index):
                return index
        if __name__ == "__main__":
            loader = DataLoader(Numbers(), num_workers=1, multiprocessing_context="spawn")
            print([int(batch) for batch in loader])
        """,
    )
    ours = _run(folder)
    assert ours.stdout == "[0, 1, 2, 3]\n", ours.stderr


def test_under_torchrun_both_ranks_decide_alike(folder: Path) -> None:
    """By the ready file, sooner than it says."""
    script = _script(
        folder,
        """
        import gc, pathlib, sys, torch, sibling
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        model = DistributedDataParallel(sibling.Model())
        torch.manual_seed(dist.get_rank())
        losses = sibling.train(model, 14)
        pathlib.Path(__file__).with_name(f"{sys.argv[1]}{dist.get_rank()}").write_text(str(losses))
        del model
        gc.collect()
        dist.destroy_process_group()
        """,
    )
    plain = run_torchrun(script, 2, "plain")
    assert plain.returncode == 0, plain.stderr
    document = yaml.safe_load((REPOSITORY / "configs" / "torchrun.yaml").read_text())
    document["gradckpt"] |= yaml.safe_load((folder / "config.yaml").read_text())["gradckpt"]
    (folder / "torchrun.yaml").write_text(yaml.safe_dump(document))
    launched = ["gradckpt_dist", "run", "--config", str(folder / "torchrun.yaml"), str(script), "ours"]
    ours = run_torchrun("-m", 2, *launched)
    assert ours.returncode == 0, ours.stderr
    for rank in range(2):
        assert (folder / f"ours{rank}").read_text() == (folder / f"plain{rank}").read_text()
    logs = [_decisions(folder, name) for name in ("gradckpt.jsonl", "gradckpt.rank1.jsonl")]
    assert len(logs[0]) >= 2
    first, second = ([(d["step"], d["epoch"], d["digest"]) for d in log] for log in logs)
    assert first == second


def test_compiled_whole_model_is_refused_in_one_line(folder: Path) -> None:
    _script(
        folder,
        """
        import torch, sibling
        sibling.train(torch.compile(sibling.Model(), backend="eager"), 1)
        """,
    )
    ours = _run(folder)
    assert ours.returncode == 2
    assert "ConflictError" in ours.stderr
    assert "Traceback" not in ours.stderr
