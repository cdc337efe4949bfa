"""CMA-ES whose samples a Gaussian process ranks before any of them is scored."""
