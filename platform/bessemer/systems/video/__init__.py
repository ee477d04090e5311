"""Systems that generate video."""
