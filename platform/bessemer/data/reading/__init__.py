"""Reading a data set: where it lies, the node's cache, decoding, batches."""
