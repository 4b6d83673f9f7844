"""From shards to batches. Submodules load one by one: a decode worker needs no torch."""
