"""From a recipe to weights: the recipe, the merger, the merge methods and their kernels."""
