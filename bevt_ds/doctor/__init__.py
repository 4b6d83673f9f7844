"""`bevt doctor`: whether this machine can train, a line for each thing, with the remedy where one is wanting.

Start with cli.py. No module of the training imports this folder.
"""
