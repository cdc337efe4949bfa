"""Runs in a browser while they go on: `followed` reads their logs, once for all viewers; `server` shows them."""
