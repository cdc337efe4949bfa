"""How the step size follows success."""

import math

LEGACY = (0.05, 0.2)
"""LLM-Evo-Merge's `sigma_low` after an improvement, `sigma_high` otherwise."""

SMALLEST, LARGEST = 1e-3, 0.5


def next_sigma(rule: str, before: float, adapted: float, improved: bool, genes: int) -> float:
    """The step size of the next generation.

    `csa` and `llm`: `adapted`, what CMA-ES makes of the path's length (Hansen, https://arxiv.org/abs/1604.00772,
    equation 44). `success`: longer after an improvement, shorter otherwise, steady at one improvement in five
    (Rechenberg 1973; Kern et al. 2004). `legacy`: one of LLM-Evo-Merge's two. All are shares of a gene's range.
    """
    if rule == "legacy":
        return LEGACY[0] if improved else LEGACY[1]
    if rule == "success":
        damping = math.sqrt(genes + 1)
        adapted = before * math.exp(1 / damping if improved else -1 / (4 * damping))
    return min(max(adapted, SMALLEST), LARGEST)


def spread_factors(spread: tuple[str, ...]) -> list[float]:
    """What an LLM's words for each slice mean: a share of the step size."""
    return [{"tighter": 0.5, "wider": 2.0}.get(word, 1.0) for word in spread]
