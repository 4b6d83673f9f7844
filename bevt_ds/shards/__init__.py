"""Writing, checking and describing shards: what `bevt shards` does. Nothing here is needed to train.

cli.py is the command; sources.py and file_lists.py find files, pack.py and writer.py write tars, check.py and stats.py
read them back; synthetic/ draws the demo's clips and images. Start with cli.py.
"""
