"""Generative systems, in rooms that follow the taxonomy of generative models."""
