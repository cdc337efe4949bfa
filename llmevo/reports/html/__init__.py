"""The report of a run, or of several: one HTML page that opens offline. From the log alone.

`subject` is what a page is about, `shrinkage`, `effects`, `predictions` and `items` are its numbers, `figures` and
`candidates` what the browser draws, `page` and `comparison` put it together; the templates are Jinja's.
"""
