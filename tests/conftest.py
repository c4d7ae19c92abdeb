"""What no test may leave behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch._inductor.compile_fx  # here, as it sets environment variables and makes tensors when it is imported
import torch.distributed as dist
from torch.nn.modules import module as modules

hypothesis.settings.register_profile("no times", deadline=None)
hypothesis.settings.load_profile("no times")

SET_BY_LIBRARIES = {"PYTEST_CURRENT_TEST", "TRITON_CACHE_DIR", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"}


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a process group, a global module hook, another default, or a changed environment."""
    environment = dict(os.environ)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.get_deterministic_debug_mode()
    yield
    left = []
    if dist.is_initialized():
        dist.destroy_process_group()
        left.append("a process group")
    if modules._global_forward_pre_hooks:
        modules._global_forward_pre_hooks.clear()
        left.append("a global forward pre-hook")
    if (torch.get_default_dtype(), torch.get_num_threads()) != (dtype, threads):
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        left.append("another default dtype or number of threads")
    if torch.get_deterministic_debug_mode() != deterministic:
        torch.set_deterministic_debug_mode(deterministic)
        left.append("another setting of deterministic algorithms")
    changed = {
        key for key in environment | os.environ if environment.get(key) != os.environ.get(key)
    } - SET_BY_LIBRARIES
    if changed:
        os.environ.clear()
        os.environ.update(environment)
        left.append(f"environment variables {sorted(changed)}")
    if left:
        pytest.fail(f"this test leaves behind: {', '.join(left)}")
