"""m2l: train experts from one base, merge them in weight space, measure what the merge is worth."""

__version__ = "0.1.0"
