"""The merge methods: `METHODS` is the registry, one method a file (or a method and its variant).

To add one: a file with a `Method`, and its line here. The contract tests pick it up by themselves.
"""

from llmevo.methods.arcee_fusion import ARCEE_FUSION
from llmevo.methods.base import Method, Parameter
from llmevo.methods.breadcrumbs import BREADCRUMBS, BREADCRUMBS_TIES
from llmevo.methods.dare import DARE_LINEAR, DARE_TIES
from llmevo.methods.della import DELLA, DELLA_LINEAR
from llmevo.methods.karcher import KARCHER
from llmevo.methods.linear import LINEAR
from llmevo.methods.model_stock import MODEL_STOCK
from llmevo.methods.multislerp import MULTISLERP
from llmevo.methods.nearswap import NEARSWAP
from llmevo.methods.nuslerp import NUSLERP
from llmevo.methods.passthrough import PASSTHROUGH
from llmevo.methods.ram import RAM, RAMPLUS_TL
from llmevo.methods.sce import SCE
from llmevo.methods.slerp import SLERP
from llmevo.methods.task_arithmetic import TASK_ARITHMETIC
from llmevo.methods.ties import TIES

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        LINEAR,
        SLERP,
        TASK_ARITHMETIC,
        TIES,
        DARE_LINEAR,
        DARE_TIES,
        BREADCRUMBS,
        BREADCRUMBS_TIES,
        DELLA,
        DELLA_LINEAR,
        NUSLERP,
        MULTISLERP,
        KARCHER,
        MODEL_STOCK,
        SCE,
        RAM,
        RAMPLUS_TL,
        ARCEE_FUSION,
        NEARSWAP,
        PASSTHROUGH,
    )
}
"""Every merge method by its name in mergekit's YAML."""

__all__ = ["METHODS", "Method", "Parameter"]
