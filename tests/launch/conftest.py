"""Lets the tests import the scripts of launch/ as Python does when it runs one of them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))
