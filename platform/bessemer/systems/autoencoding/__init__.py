"""Auto-encoders: an encoder into latent variables and a decoder back."""
