"""Compiled passes over blocks of tensors, which the merge methods are made of."""
