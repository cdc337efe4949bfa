"""The search: the search space, the optimizers, the prompts and the objectives."""
