"""What a search is for beside a sum of scores: constraints (Deb's rules) and several aims at once (Pareto)."""

from llmevo.search.objectives.constraints import ConstraintChecker, Held, held
from llmevo.search.objectives.objective import Constraint, Objective
from llmevo.search.objectives.pareto import front
from llmevo.search.objectives.scalarize import random_weights, scalarize

__all__ = ["Constraint", "ConstraintChecker", "Held", "Objective", "front", "held", "random_weights", "scalarize"]
