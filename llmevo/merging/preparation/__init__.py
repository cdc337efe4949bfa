"""Preparation: changes of the experts that do not depend on the weights of a merge, made once before it."""
