"""The merge methods. To add one: a file with its function, and its entry in `registry.py`."""
