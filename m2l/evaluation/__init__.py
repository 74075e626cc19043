"""Evaluation: rank classification for tasks with answer choices, decoding and the
reference's likelihood for those without. docs/evaluation.md says what is computed.
"""
