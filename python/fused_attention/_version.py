"""The version, in this one place: setup.py reads it and passes it on to the C++ code."""

__version__ = "0.1.0"
