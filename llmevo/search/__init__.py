"""What to try next: the search space, the optimizers, the prompts and the objectives."""
