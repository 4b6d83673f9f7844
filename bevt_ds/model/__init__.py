"""The network, its tokenizers and teachers, and checkpoints in every layout that is read.

video_swin.py is the encoder that images and clips share; bevt.py puts decoders and the masked head on it, classifier.py
a linear head; layers.py and windows.py are their parts. weights.py reads and writes checkpoints, containers.py and
layouts.py those of others, convert.py the official ones. Start with video_swin.py, then bevt.py.
"""
