"""The merge methods by name: what each is called, its parameters with bounds and defaults, and its paper.

Only these are needed to read a config, a recipe or a log; the arithmetic, a file a method, is imported for merging.
"""

from llmevo.merging.methods.method import Method, Parameter

WEIGHT = Parameter(default=None, low=0.0, high=1.5)

DENSITY = Parameter(default=1.0, low=0.01, high=1.0, start=1.0)
"""The share of the entries that is kept."""

GAMMA = Parameter(default=0.01, low=0.0, high=0.2, start=0.01)
"""Of Breadcrumbs: the share of the entries that is left out for being the largest."""

EPSILON = Parameter(default=0.15, low=0.0, high=0.3, start=0.15)
"""Of DELLA: half the distance between the keeping probabilities of the smallest and the largest entry of a row."""

CHANGED = Parameter(default=1e-5)
"""Of RAM, which calls it epsilon: the magnitude an entry of a task vector has to exceed to count as changed."""


def shared(normalize: bool, rescale: bool) -> dict[str, Parameter]:
    """Parameters of the whole merge of TIES, DARE, Breadcrumbs and DELLA, with a method's own defaults.

    `rescale` scales what is kept of a task vector to the L1 norm it had, as mergekit does; `inverse_density` divides
    each kept entry by the probability with which it was kept, as the papers of DARE and DELLA do, instead.
    """
    return {
        "normalize": Parameter(default=normalize),
        "rescale": Parameter(default=rescale),
        "inverse_density": Parameter(default=False),
        "lambda": Parameter(default=1.0),
    }


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="linear",
            function="linear.linear",
            paper="https://arxiv.org/abs/2203.05482",
            each={"weight": Parameter(default=None, low=0.0, high=1.0)},
            shared={"normalize": Parameter(default=True)},
            normalize=True,
        ),
        Method(
            name="slerp",
            function="slerp.slerp",
            paper="https://en.wikipedia.org/wiki/Slerp",
            shared={"t": Parameter(default=None, low=0.0, high=1.0)},
            pair=True,
            models=(1, 1),
        ),
        Method(
            name="task_arithmetic",
            function="task_arithmetic.task_arithmetic",
            paper="https://arxiv.org/abs/2212.04089",
            each={"weight": Parameter(default=None, low=0.0, high=1.5)},
            shared={"normalize": Parameter(default=False), "lambda": Parameter(default=1.0)},
            takes_base=True,
            normalize=False,
            without_effect=("density", "rescale"),
        ),
        Method(
            name="ties",
            function="ties.ties",
            paper="https://arxiv.org/abs/2306.01708",
            each={"weight": WEIGHT, "density": DENSITY},
            shared=shared(normalize=True, rescale=False),
            takes_base=True,
            normalize=True,
        ),
        Method(
            name="dare_linear",
            function="dare.dare_linear",
            paper="https://arxiv.org/abs/2311.03099",
            each={"weight": WEIGHT, "density": DENSITY},
            shared=shared(normalize=False, rescale=True),
            takes_base=True,
            normalize=False,
        ),
        Method(
            name="dare_ties",
            function="dare.dare_ties",
            paper="https://arxiv.org/abs/2311.03099",
            each={"weight": WEIGHT, "density": DENSITY},
            shared=shared(normalize=False, rescale=True),
            takes_base=True,
            normalize=True,
        ),
        Method(
            name="breadcrumbs",
            function="breadcrumbs.breadcrumbs",
            paper="https://arxiv.org/abs/2312.06795",
            each={"weight": WEIGHT, "density": DENSITY, "gamma": GAMMA},
            shared=shared(normalize=False, rescale=False),
            takes_base=True,
            normalize=False,
        ),
        Method(
            name="breadcrumbs_ties",
            function="breadcrumbs.breadcrumbs_ties",
            paper="https://arxiv.org/abs/2312.06795",
            each={"weight": WEIGHT, "density": DENSITY, "gamma": GAMMA},
            shared=shared(normalize=False, rescale=False),
            takes_base=True,
            normalize=False,
        ),
        Method(
            name="della",
            function="della.della",
            paper="https://arxiv.org/abs/2406.11617",
            each={"weight": WEIGHT, "density": DENSITY, "epsilon": EPSILON},
            shared=shared(normalize=True, rescale=True),
            takes_base=True,
            normalize=True,
        ),
        Method(
            name="della_linear",
            function="della.della_linear",
            paper="https://arxiv.org/abs/2406.11617",
            each={"weight": WEIGHT, "density": DENSITY, "epsilon": EPSILON},
            shared=shared(normalize=False, rescale=True),
            takes_base=True,
            normalize=False,
        ),
        Method(
            name="nuslerp",
            function="nuslerp.nuslerp",
            paper="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
            each={"weight": Parameter(default=None, low=0.0, high=1.0)},
            shared={"nuslerp_row_wise": Parameter(default=False), "nuslerp_flatten": Parameter(default=True)},
            may_take_base=True,
            models=(2, 2),
        ),
        Method(
            name="multislerp",
            function="multislerp.multislerp",
            paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
            each={"weight": Parameter(default=None, low=0.0, high=1.0)},
            shared={"normalize_weights": Parameter(default=True), "eps": Parameter(default=1e-8)},
            may_take_base=True,
        ),
        Method(
            name="karcher",
            function="karcher.karcher",
            paper="https://arxiv.org/abs/2603.04972",
            shared={"max_iter": Parameter(default=10.0), "tol": Parameter(default=1e-5)},
        ),
        Method(
            name="model_stock",
            function="model_stock.model_stock",
            paper="https://arxiv.org/abs/2403.19522",
            shared={"filter_wise": Parameter(default=False)},
            takes_base=True,
            models=(2, None),
        ),
        Method(
            name="sce",
            function="sce.sce",
            paper="https://arxiv.org/abs/2408.07990",
            shared={"select_topk": Parameter(default=1.0, low=0.01, high=1.0, start=1.0)},
            takes_base=True,
        ),
        Method(
            name="ram",
            function="ram.ram",
            paper="https://arxiv.org/abs/2601.13572",
            shared={"epsilon": CHANGED},
            takes_base=True,
        ),
        Method(
            name="ramplus_tl",
            function="ram.ramplus_tl",
            paper="https://arxiv.org/abs/2601.13572",
            shared={
                "r": Parameter(default=0.1, low=0.0, high=1.0, start=0.1),
                "alpha": Parameter(default=0.2, low=0.0, high=1.0, start=0.2),
                "epsilon": CHANGED,
            },
            takes_base=True,
        ),
        Method(
            name="arcee_fusion",
            function="arcee_fusion.arcee_fusion",
            paper="https://arcee.ai",
            pair=True,
            models=(1, 1),
        ),
        Method(
            name="nearswap",
            function="nearswap.nearswap",
            paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
            # Fine-tunes of one base are rarely further apart than 0.01: beyond it the other model is all there is.
            shared={"t": Parameter(default=None, low=0.0, high=0.01, start=0.001)},
            pair=True,
            models=(1, 1),
        ),
        Method(
            name="passthrough",
            function="passthrough.passthrough",
            paper="https://github.com/arcee-ai/mergekit",
            each={"scale": Parameter(default=1.0, low=0.0, high=2.0, start=1.0)},
            models=(1, 1),
        ),
    )
}
"""Every merge method by its name in mergekit's YAML."""
