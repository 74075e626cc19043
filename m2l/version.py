"""The version of m2l."""

__version__ = "0.1.0"
