"""Measuring a model: held-out losses, multi-view tests, frozen probes, predictions, scores and images of them.

held_out.py and visualize.py close a pretraining run; multi_view.py tests a classifier; probe_run.py and probes.py train
probes on features.py's features; metrics.py counts. Start with multi_view.py.
"""
