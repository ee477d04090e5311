"""A package, not a bare folder: a library that installs a `tests` of its own must not be imported in its place."""
