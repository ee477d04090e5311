"""Places that hold objects (data shards, checkpoints) by name: disks, http servers, S3, and what fsspec knows."""
