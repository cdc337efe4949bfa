"""Engines: each holds one model, replaces its weights in place, and answers lm-eval's requests."""
