"""Making a data set: checking, shuffling, writing, indexing, verifying and looking at it."""
