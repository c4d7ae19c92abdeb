"""``python -m gradckpt_dist``."""

import sys

from gradckpt_dist.cli import main

sys.exit(main())
