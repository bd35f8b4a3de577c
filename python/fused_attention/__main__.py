"""python -m fused_attention: see cli.py."""

import sys

from .cli import main

sys.exit(main())
