"""The command line: one file for each command and `app`, which registers them; `options`, `terminal`, `live`, `voting`
and `written` are shared.
"""
