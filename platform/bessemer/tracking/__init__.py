"""The journal of a run, its mirror in MLflow, and the tables and pages people review."""
