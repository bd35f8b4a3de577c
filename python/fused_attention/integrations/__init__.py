"""Integrations: code that calls the attention of other libraries reaches the kernels here."""
