"""Doors that are others': what calls attention elsewhere comes to the kernels here."""
