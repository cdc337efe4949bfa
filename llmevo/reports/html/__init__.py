"""The report of a run, or of several: one HTML page that opens offline. From the log alone.

`subject` is what a page is about; `winners_curse`, `effects`, `predictions` and `questions` are its numbers, `figures`
what the browser draws; `page` and `comparison` put it together. The templates are Jinja's.
"""
