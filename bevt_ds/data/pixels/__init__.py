"""From frames to what a network takes: cpu_pixels.py on a CPU, DALI's graph on a GPU. Start with pipeline.py."""
