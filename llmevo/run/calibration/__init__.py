"""Calibration: forward passes over texts, for prepared models, fitted routers and mixtures that are made dense."""
