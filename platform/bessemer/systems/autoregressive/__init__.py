"""Systems that draw one element after the other."""
