"""Tasks: the lines of `tasks:`, and lm-eval's task objects for them."""
