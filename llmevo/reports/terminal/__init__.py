"""The terminal: runs live, followed and replayed, their status, inspections and comparisons."""
