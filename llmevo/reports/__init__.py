"""Reports of runs: in the terminal, as an HTML page, and as comparisons."""
