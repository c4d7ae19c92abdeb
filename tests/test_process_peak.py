"""The peak of the whole process is predicted from the mask that was in force to others."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from support import run_command

# glibc gives back at once what a tensor held, so that the resident set follows the bytes that are alive.
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SCRIPT = """
import json, random, torch, gradckpt_dist
from text_model import GPT
torch.set_num_threads(1)
torch.manual_seed(0)
model = GPT(vocabulary=64, context=128, width=256, layers=6, heads=4, dropout=0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
engine = gradckpt_dist.enable(model, {"interval": 6, "warmup_steps": 0})
tokens = torch.randint(64, (8, 128))

def step():
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(tokens), tokens.flatten()).backward()
    optimizer.step()

for _ in range(16):
    step()
pairs = []
generator = random.Random(0)
meter = engine._observer._meter
for _ in range(6):
    storages = [generator.choice(engine.config.storages) for _ in engine.mask.storages]
    predicted = engine._knowledge.evidence(engine.mask).process_peak_of(storages)
    engine.set_mask(storages)
    step()
    meter.begin()
    step()
    pairs.append([predicted, meter.peak_bytes()])
print(json.dumps(pairs))
"""


def test_the_processs_peak_is_predicted_within_10_percent_under_random_masks(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    tests = Path(__file__).parent
    paths = [str(tests.parent / "launch"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = run_command([sys.executable, str(script)], PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1", **GLIBC)
    assert done.returncode == 0, done.stderr
    pairs = json.loads(done.stdout)
    assert len({predicted for predicted, _ in pairs}) > 3
    assert max(predicted for predicted, _ in pairs) > 1.05 * min(predicted for predicted, _ in pairs)
    for predicted, measured in pairs:
        assert abs(measured - predicted) <= 0.1 * measured
