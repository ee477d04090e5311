"""Feature extractors, statistics and metrics of generated images."""
