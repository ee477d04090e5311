"""Bessemer: cluster-scale training of generative models."""

__all__ = ["__version__"]

__version__ = "0.1.0"
