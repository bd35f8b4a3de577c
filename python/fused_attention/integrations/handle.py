"""The handle of a change to another library: it undoes the change, and is a context manager."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class Handle:
    """Applies a change at once, and undoes it by `undo()` or at the end of a `with` block.

    apply, undo: make and undo the change once. They run under a lock that all handles share. undo
    may raise RuntimeError, and then has changed nothing. Handles of the same change nest if its
    apply and undo count. name: of the change. report: says, first in one line, what it did.
    """

    _lock = threading.RLock()

    def __init__(
        self,
        apply: Callable[[], None],
        undo: Callable[[], None],
        name: str = "",
        report: Callable[[], str] = str,
    ) -> None:
        self._apply, self._undo = apply, undo
        self._name, self.report = name, report
        self._depth = 0
        self._entered = False
        self._do()

    def __repr__(self) -> str:
        state = "active" if self.active else "undone"
        words = (self._name, state, self.report().partition("\n")[0])
        return f"<{type(self).__name__} {', '.join(filter(None, words))}>"

    @property
    def active(self) -> bool:
        return self._depth > 0

    def undo(self) -> None:
        """Undoes this change, however often it was entered; does nothing if it was undone before.

        Other handles stay active, in whatever order they are undone. Raises RuntimeError and
        changes nothing if other code has changed the same place since and not put it back.
        """
        while self._depth:
            self._undo_once()

    def __enter__(self) -> Handle:
        if self._entered or not self.active:
            self._do()
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._depth:
            self._undo_once()

    def _do(self) -> None:
        with self._lock:
            self._apply()
            self._depth += 1

    def _undo_once(self) -> None:
        with self._lock:
            self._undo()
            self._depth -= 1
