"""Making, checking and describing shards: what `bevt shards` does."""
