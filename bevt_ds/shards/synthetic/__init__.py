"""Drawn clips and images with motion to predict: the shards of the demo.

scene.py says what is in a clip, draw.py writes shards with draw_worker.py's processes. Start with draw.py.
"""
