"""Systems defined by an energy."""
