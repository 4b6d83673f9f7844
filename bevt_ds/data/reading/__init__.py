"""Bytes of samples: shards and their indexes, on disks, file servers and behind URLs. Start with storage.py."""
