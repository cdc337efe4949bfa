"""Mixtures of experts that are built of fine-tuned models: what they are, their tensors and their routers."""
