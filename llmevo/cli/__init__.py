"""The command line: one file for each command, and `app`, which registers them."""
