"""For test_elastic: trains under FSDP2, saves each third step, and dies where it is told to, once in each life.

torchrun … elastic_script.py FOLDER STEPS [RANK:STEP …]
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_resume import Run

SAVE_EVERY = 3


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    deaths = [tuple(map(int, death.split(":"))) for death in sys.argv[3:]]
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    run = Run(agreement_timeout_s=60)
    latest = folder / "latest"
    if latest.exists():
        run.load(latest.read_text())
    while run.steps < steps:
        if life < len(deaths) and deaths[life] == (rank, run.steps):
            os.kill(os.getpid(), signal.SIGKILL)
        (loss, digest, epoch), *_ = run.train(run.steps + 1)
        with (folder / f"rank{rank}.jsonl").open("a") as file:
            print(json.dumps([life, run.steps, loss, digest, epoch]), file=file)
        if run.steps % SAVE_EVERY == 0:
            run.save(str(folder / f"step{run.steps}"))
            if rank == 0:
                latest.write_text(str(folder / f"step{run.steps}"))
            dist.barrier()
    run.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
