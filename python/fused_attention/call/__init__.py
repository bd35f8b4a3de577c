"""Calls and the backends that serve them: validation, capability table, choice, `explain`."""
