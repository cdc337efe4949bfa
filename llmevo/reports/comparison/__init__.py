"""Finished runs compared: results, statistics, tables and the chart."""
