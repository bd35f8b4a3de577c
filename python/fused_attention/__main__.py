"""python -m fused_attention: see cli.py."""

import sys

from .tools.cli import main

sys.exit(main())
