"""The report of one run or of several: an HTML page that opens offline, from the log alone.

`analysis`, `predictions` and `pareto` are its numbers, `figures` its pictures; `page` and `comparison` compose it.
"""
