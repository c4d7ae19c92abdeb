"""The demo's model, from ``launch/`` of the clone that this package was installed from."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from gradckpt_dist.errors import ConfigError


def load_text_model() -> ModuleType:
    """The module ``launch/text_model.py``, with ``GPT`` and ``read_text``.

    Raises:
        ConfigError: this is not an editable install of a clone.
    """
    path = Path(__file__).parents[2] / "launch" / "text_model.py"
    spec = importlib.util.spec_from_file_location("text_model", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"{path}: the demo's model is not there; benches run from a clone (`make setup`)")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # torch.compile looks a function's module up by its name
    spec.loader.exec_module(module)
    return module
