"""Data sets: packed into WebDataset shards, indexed, streamed in an elastic order."""
