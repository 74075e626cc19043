"""Evaluation: rank classification for tasks with answer choices, decoding for those without."""
