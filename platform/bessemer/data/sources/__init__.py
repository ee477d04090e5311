"""What is packed: images in folders, archives, arrays, tables and shards, and their classes."""
