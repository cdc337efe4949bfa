"""What is known of genes and weights, as lines of the prompt."""

from statistics import fmean

from llmevo.genes import Gene, Genes
from llmevo.prompting.budget import Detail
from llmevo.prompting.evidence import Effect, Evidence
from llmevo.prompting.names import Names
from llmevo.prompting.question import Question
from llmevo.prompting.sheet import Sheet, scale


def geometry_lines(question: Question, sheet: Sheet, names: Names, detail: Detail) -> list[tuple[str, str, str]]:
    """(slice, norms in ten-thousandths of the base's, cosines in hundredths): of all pairs, or of the most alike."""
    slices = [facts for facts in question.geometry if facts.slice in sheet.slices]
    each = detail.cosines // max(1, len(slices))
    if not each:
        return []
    shown: list[tuple[str, str, str]] = []
    for facts in slices:
        pairs = sorted(facts.cosines.items(), key=lambda pair: -abs(pair[1]))[:each]
        alike = [(*pair.split("/", 1), cosine) for pair, cosine in facts.cosines.items() if (pair, cosine) in pairs]
        norms = [*facts.norms.items()][: detail.models]
        shown.append(
            (
                names.slices[facts.slice],
                ", ".join(f"{names.models[model]} {round(10_000 * norm)}" for model, norm in norms),
                ", ".join(f"{names.models[a]}/{names.models[b]} {round(100 * cosine)}" for a, b, cosine in alike),
            )
        )
    return shown


def effect_lines(
    question: Question, sheet: Sheet, evidence: Evidence, names: Names, filters: bool, detail: Detail
) -> list[tuple[str, list[str]]]:
    """(slice, lines): of all genes, or of those with the strongest effects."""
    known = [effect for effect in evidence.effects if effect.gene in sheet.numbers]
    kept = sorted(known, key=lambda effect: -abs(effect.strength))[: detail.effects]
    groups: list[tuple[str, list[str]]] = []
    for label in sheet.slices:
        lines = [_effect(e, question.incumbent, names, filters) for e in known if e in kept and e.gene.slice == label]
        if lines:
            groups.append((names.slices[label], lines))
    return groups


def _effect(effect: Effect, best: Genes, names: Names, filters: bool) -> str:
    """`model.parameter 43 (0-120) +12±5 +20`: best value, values tried, effect, best quarter minus the rest."""
    gene = effect.gene
    times = scale(gene)
    span = (gene.high - gene.low) * times
    # The effect of ten steps, in hundredths of a standard deviation of the scores.
    slope, error = (round(100 * value * 10 / span) for value in (effect.slope, effect.stderr))
    low, high, value = (round(v * times) for v in (effect.lowest, effect.highest, best[gene.name]))
    return (
        f"{names.column(gene, filters)} {value} ({low} to {high}) {slope:+d}±{error} {round(effect.contrast * span):+d}"
    )


def where(gene: Gene, sheet: Sheet, names: Names, filters: bool) -> str:
    """A gene with its slice."""
    column = names.column(gene, filters)
    return column if len(sheet.slices) == 1 else f"{column} in {names.slices[gene.slice or 'all']}"


def method_lines(question: Question, sheet: Sheet, names: Names) -> list[tuple[str, str]]:
    """For every choice of a merge method: (where, how each method has done)."""
    found: list[tuple[str, str]] = []
    for gene in sheet.choices:
        parts: list[str] = []
        for place, method in enumerate(gene.choices):
            values = [t.value for t in question.inside if gene.clamp(t.candidate.genes[gene.name]) == place]
            if values:
                parts.append(
                    f"{names.methods[method]} best {max(values):.3f} mean {fmean(values):.3f} of {len(values)}"
                )
        if parts:
            found.append((names.slices[gene.slice] if gene.slice else "all", "; ".join(parts)))
    return found
