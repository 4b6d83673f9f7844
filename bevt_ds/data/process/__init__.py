"""The loader in a process of its own, where its Python holds no lock that a thread which launches kernels waits for.

Start with remote.py: what the trainer has in the place of a reader. server.py is the other process.
"""
