"""Exports of a run: models, model cards, packs to share, and uploads to the Hugging Face hub."""
