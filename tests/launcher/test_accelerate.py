"""``gradckpt accelerate launch``: Accelerate's launchers, with our section taken out of their file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from support import INTERRUPTED, interruptible, run_command

from gradckpt_dist import ConfigError
from gradckpt_dist.launcher.accelerate import launch

LAUNCH = [sys.executable, "-m", "gradckpt_dist", "accelerate", "launch"]
SECTION = {"policy": "static", "every_n": 2, "interval": 4}
ACCELERATES = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "NO",
    "num_processes": 1,
    "num_machines": 1,
    "mixed_precision": "no",
    "use_cpu": True,
}
SCRIPT = """
    import json, os, sys
    from accelerate import Accelerator
    accelerator = Accelerator()
    print(json.dumps([sys.argv, sys.path[0], os.environ.get("GRADCKPT_CONFIG"), "gradckpt_dist" in sys.modules]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "temporary").mkdir()
    return tmp_path


def _write(path: Path, text: str) -> str:
    path.write_text(textwrap.dedent(text))
    return str(path)


def _config(path: Path, **changes: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {key: value for key, value in (ACCELERATES | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(given))
    return str(path)


def _launch(
    folder: Path, *arguments: str, directory: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    there = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', str(directory or Path.cwd())]
    done = run_command(
        [*there, *LAUNCH, *arguments], TMPDIR=str(folder / "temporary"), HF_HOME=str(folder), **environment
    )
    assert list((folder / "temporary").glob("gradckpt-*")) == []
    return done


def test_default_file_is_read_and_the_script_sees_its_own_arguments(folder: Path) -> None:
    script = _write(folder / "train.py", SCRIPT)
    default = _config(folder / "accelerate" / "default_config.yaml", gradckpt=SECTION)
    done = _launch(folder, script, "--config_file", "x", "-h", "+a=b")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen == [[script, "--config_file", "x", "-h", "+a=b"], str(folder), default, True]
    assert "without a model to act on" in done.stderr


@pytest.mark.slow
def test_module_and_a_section_in_fsdp_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(folder / "mine.py", SCRIPT)
    monkeypatch.chdir(folder)
    config = _config(folder / "config.yaml", fsdp_config={"fsdp_version": 2, "gradckpt": SECTION})
    python_path = os.environ.get("PYTHONPATH", "")
    done = _launch(folder, "--config-file", config, "-m", "mine", "--lr", "1", PYTHONPATH=f"{folder}:{python_path}")
    assert done.returncode == 0, done.stderr
    argv, first_path, variable, _ = json.loads(done.stdout.splitlines()[-1])
    assert (argv, first_path, variable) == ([str(folder / "mine.py"), "--lr", "1"], str(folder), config)


@pytest.mark.slow
def test_resumed_script_goes_on_with_its_mask(folder: Path) -> None:
    """It loads before the first forward, so before there is an engine."""
    script = _write(
        folder / "train.py",
        """
        import sys, torch
        from accelerate import Accelerator
        from torch import nn
        accelerator = Accelerator()
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)) for _ in range(4)))
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
        if sys.argv[1:]:
            accelerator.load_state("checkpoint")
        for _ in range(12):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        accelerator.save_state("checkpoint")
        """,
    )
    section = {"interval": 4, "warmup_steps": 0, "log_dir": str(folder / "log")}
    config = _config(folder / "config.yaml", gradckpt=section)
    epochs = []
    for arguments in ([], ["resume"]):
        done = _launch(folder, "--config_file", config, script, *arguments, directory=folder)
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in (folder / "log" / "gradckpt.jsonl").read_text().splitlines()]
        epochs = [event["epoch"] for event in events if event["event"] == "decision"]
    last = torch.load(folder / "checkpoint" / "gradckpt.pt", weights_only=True)
    assert last["step"] == 23
    assert last["epoch"] == epochs[-1] > 2


@pytest.mark.slow
def test_section_in_deepspeeds_file_is_enough(folder: Path) -> None:
    script = _write(
        folder / "train.py",
        """
        import torch
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
        from torch import nn
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)) for _ in range(4)))
        engine, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
        for _ in range(2):
            accelerator.backward(engine(torch.randn(1, 8)).square().mean())
        print(type(engine).__name__)
        """,
    )
    batches = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    document = {**batches, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    section = SECTION | {"memory_budget": None, "log_dir": str(folder / "log"), "log_level": "debug"}
    (folder / "deepspeed.json").write_text(json.dumps(document | {"gradckpt": section}))
    plugin = {"deepspeed_config_file": str(folder / "deepspeed.json")}
    changes = {"distributed_type": "DEEPSPEED", "use_cpu": False, "main_process_port": 0, "deepspeed_config": plugin}
    changes |= {
        "num_processes": 2,
        "mixed_precision": None,
    }  # Accelerate refuses the latter beside DeepSpeed's own file
    done = _launch(folder, "--config_file", _config(folder / "config.yaml", **changes), script, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr
    assert "DeepSpeedEngine" in done.stdout
    logs = [(folder / "log" / name).read_text() for name in ("gradckpt.jsonl", "gradckpt.rank1.jsonl")]
    starts = [json.loads(log.splitlines()[0]) for log in logs]
    assert [start["mask"] for start in starts] == [["recompute", "keep", "recompute", "keep"]] * 2
    assert [start["config"]["memory_budget"] for start in starts] == ["auto", "auto"]


def test_interrupt_reaches_the_script(folder: Path) -> None:
    script = _write(folder / "train.py", INTERRUPTED)
    config = _config(folder / "config.yaml", gradckpt=SECTION)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    environment = os.environ | {"TMPDIR": str(folder / "temporary")}
    command = [*LAUNCH, "--config_file", config, script]
    with interruptible(command, env=environment, **options) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, _ = process.communicate(timeout=60)
    assert output == "cleaned up\n"
    assert process.returncode == -signal.SIGINT
    assert list((folder / "temporary").glob("gradckpt-*")) == []


@pytest.mark.parametrize("place", ["top", "fsdp_config"])
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_wrong_key_names_the_file(folder: Path, place: str, suffix: str) -> None:
    section = {"gradckpt": {"intervall": 3}}
    path = folder / f"config{suffix}"
    path.write_text(json.dumps(ACCELERATES | (section if place == "top" else {"fsdp_config": section})))
    with pytest.raises(ConfigError) as error:
        launch(["--config_file", str(path), "train.py"])
    assert str(error.value).startswith(f"{path}: unknown key 'intervall'; did you mean 'interval'?")


def test_what_cannot_be_launched_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--no_python starts a program"):
        launch(["--no_python", "train"])
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: there is no such file"):
        launch(["--config_file", str(folder / "nowhere.yaml"), "train.py"])
    both = _config(folder / "config.yaml", gradckpt=SECTION, fsdp_config={"gradckpt": SECTION})
    with pytest.raises(ConfigError, match="is there twice"):
        launch(["--config_file", both, "train.py"])


def test_missing_accelerate_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ConfigError, match=r"pip install 'gradckpt_dist\[accelerate\]'"):
        launch(["train.py"])


def test_help_is_accelerates_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        launch(["--help"])
    assert end.value.code == 0
    assert "--num_processes" in capsys.readouterr().out
