"""Layer paths: their space, the edits of a path, and the optimizers that search it."""
