"""Optimizers of logs with `rules` below 3, kept to verify and resume them."""
