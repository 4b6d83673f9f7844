"""Labelled videos, for fine-tuning, evaluation and probes."""
