"""From the bytes of a file to frames: containers checked, decoders in processes of their own. Start with pool.py."""
