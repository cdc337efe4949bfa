"""Objectives and constraints: the weighted sum, the Pareto front, scalarization, and Deb's rules of feasibility."""
