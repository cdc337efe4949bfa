"""Judges: an LLM that grades what a candidate writes, and a person who votes on it."""
