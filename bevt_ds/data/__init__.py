"""From shards to micro-batches, the same for every rank layout: plan, read, decode, crop, mask.

plan.py says which sample and which crop as pure functions; reading/ reads tars, decoding/ decodes frames, pixels/ makes
the network's views, stream.py and loader.py deliver batches; labelled_*.py do so for labelled clips. Imports no
DeepSpeed. Start with plan.py, then loader.py.
"""
