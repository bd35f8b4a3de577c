"""python -m fused_attention record SCRIPT: runs a script as `python SCRIPT` does, and records what
served its calls of attention."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from ..call.record import Calls, record_calls


def run_recorded(script: str, arguments: Sequence[str]) -> tuple[int, Calls]:
    """Runs a script in this process; returns its exit status, and what it called until its end."""
    with record_calls() as calls:
        return run(script, arguments), calls


def run(script: str, arguments: Sequence[str]) -> int:
    """Runs a script as `__main__`, with its own sys.argv and its folder first in sys.path. Returns
    the exit status that Python would have; an exception is printed as Python does it."""
    argv, path = sys.argv, sys.path
    sys.argv = [script, *arguments]
    sys.path = [os.path.dirname(os.path.abspath(script)), *path[1:]]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != script:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        sys.argv, sys.path = argv, path
    return 0
