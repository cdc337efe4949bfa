"""What a search is for beside a sum of scores: constraints (Deb's rules) and several aims at once (Pareto)."""

from llmevo.aims.constraint import Constraint
from llmevo.aims.front import front
from llmevo.aims.heldout import Held, held
from llmevo.aims.keeping import Keeping
from llmevo.aims.objective import Aims
from llmevo.aims.valuing import emphasis, valued

__all__ = ["Aims", "Constraint", "Held", "Keeping", "emphasis", "front", "held", "valued"]
