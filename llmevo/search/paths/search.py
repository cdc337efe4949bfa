"""The search of layer paths: edits of the best whole model's path, ranked by an additive surrogate."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from threadpoolctl import ThreadpoolController

from llmevo.errors import RecipeError
from llmevo.merging.path import ROPE, LayerPath
from llmevo.search.optimizers.base import Asking, CallDigest, ReproducibleOptimizer, Setup
from llmevo.search.optimizers.llm_share import SUCCESS, Share, probability_of_improvement
from llmevo.search.paths import prompt
from llmevo.search.paths.edits import Edit, rope_edit
from llmevo.search.paths.prompt import PathQuestion
from llmevo.search.paths.space import MERGE, ROPES
from llmevo.search.paths.surrogate import Additive, Features, features_of
from llmevo.search.space import Genes
from llmevo.search.trial import Suggestion, Trial

WIDTH, DEPTH, EXPANDED = 8, 3, 24  # of the beam: paths kept, edits added one after the other, edits tried with each
CONFIDENCE = 2.0  # standard deviations above the expectation
OVERHEAD = 0.5  # standard deviations of the scores that as many layers again as the models have must be worth
SINGLES = 3  # 1/SINGLES of the evaluations, at least FEWEST, are single edits that are spread over the depth
FEWEST = 6
NEAR = 2  # of the best paths the neighbours are tried too
MANY = 100  # edits of a kind that are taken from a scan
DAMPED = (0.35, 0.5, 0.7, 1.0)  # gains that a neighbour's repeat may have
PROPOSALS = 4  # asked for in each prompt, at most
GENERATION = 3  # candidates between two prompts
TRIES = 200  # drawn paths, of which the first new one counts


class PathOptimizer(ReproducibleOptimizer):
    """The base of optimizers of layer paths. They start from the path of the best whole model or weight merge, their
    root, once the start rows are scored.
    """

    learns_paths = True
    origin = ""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._space, self._paths = setup, setup.space, setup.space.paths
        self._random = np.random.default_rng(setup.seed)
        self._history = CallDigest(setup.seed, setup.budget, self._paths.settings.model_dump(mode="json"))
        self._trials: list[Trial] = []
        self._weights: Mapping[str, float] = {}
        """Of the objectives, where there are several."""
        self._root = ""
        self._merge: Genes = {}
        self._known: set[str] = set()

    def tell(self, trials: Sequence[Trial]) -> None:
        self._history.told(trials)
        self._trials += trials
        self._known |= {trial.candidate.path for trial in trials if trial.candidate.path}

    def retell(self, trials: Sequence[Trial], weights: Mapping[str, float]) -> None:
        self._history.told(trials)
        self._trials = [*trials]
        self._weights = weights

    def _begin(self) -> None:
        """Choose the root and the weight merge that paths may take layers of, from the scores so far."""
        if self._root:
            return
        whole = [trial for trial in self._trials if trial.score and self._name_of(trial)]
        best = max(whole, key=lambda trial: trial.rank, default=None)
        merges = [trial for trial in whole if self._name_of(trial) == MERGE]
        merge = max(merges, key=lambda trial: trial.rank, default=None)
        self._merge = merge.candidate.genes if merge else self._space.clamp(self._space.uniform())
        self._root = self._name_of(best) if best else MERGE
        self._known |= {str(self._paths.whole(name)) for name in (*self._paths.models, MERGE)}

    def _name_of(self, trial: Trial) -> str:
        """Return a whole model's or merge's name in paths; empty for a path, and for a parent of a space of weights."""
        candidate = trial.candidate
        if candidate.origin == "parent":
            named = {name: model for model, name in self._space.names.items()}
            return self._paths.name_of(named[candidate.note]) if candidate.note in named else ""
        return MERGE if candidate.lies_in(self._space) else ""

    def _others(self) -> list[str]:
        """The models, and the merge, that layers may be swapped from."""
        merged = {self._paths.name_of(model) for model in self._space.merged}
        return [name for name in (*(n for n in self._paths.models if n in merged), MERGE) if name != self._root]

    def _suggest(self, path: LayerPath, origin: str, note: str = "", expected: float | None = None) -> Suggestion:
        """A candidate; its note is the root and its edits, unless there is another."""
        uses = any(segment.model == MERGE for segment in path.segments)
        said = note or f"{self._root}: {', '.join(map(str, self._paths.edits(path, self._root)))}"
        self._known.add(str(path))
        return Suggestion(self._merge if uses else {}, origin, said, expected=expected, path=str(path))

    def _singles(self) -> list[Edit]:
        return [*self._paths.singles(self._others())]

    def _drawn(self, count: int) -> list[Edit]:
        """Edits drawn with equal chances for every kind."""
        by_kind: dict[str, list[Edit]] = {}
        for edit in self._singles():
            by_kind.setdefault(edit.kind, []).append(edit)
        kinds = [*by_kind.values()]
        if not kinds:
            return []
        drawn = (kinds[int(self._random.integers(len(kinds)))] for _ in range(count))
        return [group[int(self._random.integers(len(group)))] for group in drawn]

    def _draw(self, most: int) -> Suggestion | None:
        """A new path of one to `most` drawn edits; None where none was found."""
        for _ in range(TRIES):
            path = self._paths.edited(self._root, self._drawn(1 + int(self._random.integers(most))))
            if path is not None and str(path) not in self._known:
                return self._suggest(path, self.origin)
        return None


class PathSearch(PathOptimizer):
    """Layer paths by edits of the best whole model's: first single edits, spread over the depth; then the paths of the
    highest upper confidence bound of an additive surrogate, found by a beam that adds edits from the last layers to the
    first ones, and among the neighbours of the best paths.

    With an LLM, it proposes paths in the text form, for as many of the evaluations as they are worth. Use it for 20 to
    1,000 evaluations.
    """

    files = prompt.FILES
    origin = "paths"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._threads = ThreadpoolController()
        self._model = Additive()
        self._rows: dict[LayerPath, Features] = {}
        self._spread: list[LayerPath] | None = None
        self._share = Share(SUCCESS["chat"])
        self._proposed: list[tuple[str, str]] = []
        self._own: set[str] = set()
        self._more: list[Edit] = []
        self._analysis = ""
        self._generation = self._scored = 0

    @property
    def trust(self) -> float | None:
        return self._share.value if self._setup.style == "chat" else None

    def ask(self, size: int) -> Asking:
        self._history.add("ask", size)
        self._begin()
        self._generation += 1
        size = min(size, max(GENERATION, self._setup.parallel))
        with self._threads.limit(limits=1):  # more threads would change the digits
            self._observe()
        asks = self._setup.style == "chat" and self._share.may_ask()
        slots = self._share.slots(size) if asks else 0
        own = (yield from self._ask_llm(slots)) if slots else []
        self._share.spend(size, len(own))
        with self._threads.limit(limits=1):
            return [*own, *self._numeric(size - len(own), own)]

    # The surrogate

    def _learnt(self) -> list[Trial]:
        """The trials that the surrogate learns from: paths with few edits of the root, and the root itself."""
        allowed = self._paths.settings.edits
        found: list[Trial] = []
        for trial in self._trials:
            path = self._path_of(trial)
            if path is not None and len(self._paths.edits(path, self._root)) <= allowed:
                found.append(trial)
        return found

    def _is_root(self, trial: Trial) -> bool:
        return self._path_of(trial) == self._paths.whole(self._root)

    def _path_of(self, trial: Trial) -> LayerPath | None:
        if trial.candidate.path:
            same = not trial.candidate.genes or trial.candidate.genes == self._merge
            return self._paths.parse(trial.candidate.path) if same else None
        name = self._name_of(trial)
        if name == MERGE and trial.candidate.genes != self._merge:
            return None
        return self._paths.whole(name) if name else None

    def _features(self, path: LayerPath) -> Features:
        if path not in self._rows:
            row = features_of(self._paths.edits(path, self._root), self._paths.layers, len(path))
            if self._setup.scan:
                row["scan",] = self._prior(path)
            self._rows[path] = row
        return self._rows[path]

    def _fit(self, pending: Sequence[Suggestion] = ()) -> bool:
        """Learn; pending paths count as if they had scored what is expected of them. False before any score."""
        trials = [(path, trial) for trial in self._learnt() if (path := self._path_of(trial))]
        if not any(trial.score for _, trial in trials):
            return False
        rows, values = [self._features(path) for path, _ in trials], [trial.value for _, trial in trials]
        own = [trial.value for trial in self._trials if trial.score and self._is_root(trial)]
        centre = max(own, default=None)
        self._model.fit(rows, values, centre)
        if pending:
            more = [self._features(self._paths.parse(one.path)) for one in pending]
            expected, _ = self._model.predict(more)
            self._model.fit([*rows, *more], [*values, *map(float, expected)], centre)
        return True

    def _bounds(self, paths: Sequence[LayerPath]) -> list[float]:
        """The upper confidence bounds, less what more layers cost."""
        if not paths:
            return []
        means, deviations = self._model.predict([self._features(path) for path in paths])
        extra = np.array([max(0.0, len(path) / self._paths.layers - 1) for path in paths])
        bounds = means + CONFIDENCE * deviations - OVERHEAD * self._model.scale * extra
        return [round(float(bound), 9) for bound in bounds]  # equal on every machine

    # Numeric candidates

    def _numeric(self, count: int, own: Sequence[Suggestion] = ()) -> list[Suggestion]:
        chosen: list[Suggestion] = []
        while len(chosen) < count:
            path = self._next_single() if self._fit([*own, *chosen]) else None
            one = self._suggest(path, self.origin) if path else None
            if one is None and (best := self._best_of_beam()):
                expected = float(self._model.predict([self._features(best)])[0][0])
                one = self._suggest(best, self.origin, expected=round(expected, 4))
            one = one or self._draw(2)  # where nothing is known yet, or all of the beam is
            if one is None:
                break
            chosen.append(one)
        return chosen

    def _next_single(self) -> LayerPath | None:
        """The next single edit that is spread over the depth; None once a share of the evaluations is spent."""
        if self._spread is None:
            begun = len(self._trials)
            count = max(FEWEST, (self._setup.budget - begun) // SINGLES)
            self._spread = self._spread_out(count)
        while self._spread:
            path = self._spread.pop(0)
            if str(path) not in self._known:
                return path
        return None

    def _spread_out(self, count: int) -> list[LayerPath]:
        """Single edits of every kind in turn: those of the highest effects in a scan, or at depths of a low discrepancy
        (van der Corput) with a random shift, of every size.
        """
        if scanned := self._scanned():
            return scanned[:count]
        groups: dict[tuple[str, str], list[Edit]] = {}
        for edit in self._singles():
            groups.setdefault((edit.kind, edit.model), []).append(edit)
        by_kind: dict[str, list[list[Edit]]] = {}
        for (kind, _), group in groups.items():
            by_kind.setdefault(kind, []).append(sorted(group, key=lambda edit: (edit.start + edit.stop, edit)))
        found: list[LayerPath] = []
        shifts = {
            kind: (float(self._random.random()), int(self._random.integers(len(by_kind[kind])))) for kind in by_kind
        }
        for turn in range(20 * count):
            for kind, groups_of in by_kind.items():
                shift, first = shifts[kind]
                group = groups_of[(first + turn) % len(groups_of)]
                depth = (int(f"{turn + 1:b}"[::-1], 2) / 2 ** len(f"{turn + 1:b}") + shift) % 1.0
                path = self._paths.edited(self._root, [group[int(depth * len(group))]])
                if path is not None and path not in found and str(path) not in self._known:
                    found.append(path)
            if len(found) >= count:
                break
        return found[:count]

    def _scanned(self) -> list[LayerPath]:
        """The scan's single edits of the root that gain, every kind in turn, the clearest first."""
        by_kind: dict[str, list[tuple[float, str, LayerPath]]] = {}
        for text, (effect, stderr) in self._setup.scan.items():
            try:
                path = self._paths.parse(text)
                self._paths.check_edits(path)
            except RecipeError:  # of other models, or outside the bounds of this search
                continue
            edits = self._paths.edits(path, self._root)
            if len(edits) == 1 and text not in self._known:
                by_kind.setdefault(edits[0].kind, []).append((-effect / max(stderr, 1e-9), text, path))
        ranked = [sorted(group)[:MANY] for group in by_kind.values()]
        turns = [[group[place][2] for group in ranked if place < len(group)] for place in range(MANY)]
        return [path for turn in turns for path in turn]

    def _prior(self, path: LayerPath) -> float:
        """The sum of the scan's effects of a path's edits, in their standard deviations."""
        effects = np.array([effect for effect, _ in self._setup.scan.values()])
        alone = (self._paths.edited(self._root, [edit]) for edit in self._paths.edits(path, self._root))
        known = [self._setup.scan[str(one)][0] for one in alone if one and str(one) in self._setup.scan]
        # One effect, or equal ones, have no deviation: a feature of 10⁹ would leave the regression without digits.
        deviation = max(float(np.std(effects)), 1e-3 * float(np.abs(effects).max(initial=0.0)), 1e-9)
        return sum(known) / deviation if known else 0.0

    def _best_of_beam(self) -> LayerPath | None:
        """The new path of the highest bound; None where all are known."""
        if not any(trial.score for trial in self._learnt()):
            return None
        pool = self._beam() | self._neighbours()
        new = [path for text, path in sorted(pool.items()) if text not in self._known]
        bounds = self._bounds(new)
        if not new:
            return None
        return new[max(range(len(new)), key=lambda place: bounds[place])]

    def _beam(self) -> dict[str, LayerPath]:
        """Paths by their text: of single edits, and of the best of these with more edits before them."""
        singles = [*dict.fromkeys([*self._singles(), *self._more])]
        paths = [(edit, path) for edit in singles if (path := self._paths.edited(self._root, [edit]))]
        ranked = sorted(zip(self._bounds([path for _, path in paths]), paths, strict=True), key=_rank)
        found = {str(path): path for _, path in paths}
        tried = [edit for _, (edit, _) in ranked[:EXPANDED]]
        beam: list[tuple[Edit, ...]] = [(edit,) for edit in tried[:WIDTH]]
        for _ in range(min(DEPTH, self._paths.settings.edits) - 1):
            grown: dict[str, tuple[tuple[Edit, ...], LayerPath]] = {}
            for edits in beam:
                for edit in tried:
                    if edit.stop > min(each.start for each in edits):
                        continue
                    if path := self._paths.edited(self._root, [*edits, edit]):
                        grown.setdefault(str(path), ((*edits, edit), path))
            if not grown:
                break
            bounds = self._bounds([path for _, path in grown.values()])
            ordered = sorted(zip(bounds, grown.values(), strict=True), key=_rank)
            beam = [edits for _, (edits, _) in ordered[:WIDTH]]
            found |= {str(path): path for _, (_, path) in ordered}
        return found

    def _neighbours(self) -> dict[str, LayerPath]:
        """Of the best paths those with an edit moved by a layer, with another gain, or without one of the edits."""
        best = sorted((t for t in self._learnt() if t.score and t.candidate.path), key=lambda t: t.rank)[-NEAR:]
        found: dict[str, LayerPath] = {}
        for trial in best:
            edits = self._paths.edits(self._paths.parse(trial.candidate.path), self._root)
            for place, edit in enumerate(edits):
                rest = [*edits[:place], *edits[place + 1 :]]
                for other in (*moved(edit), None):
                    path = self._paths.edited(self._root, [*rest, other] if other else rest)
                    if path is not None:
                        found[str(path)] = path
        return found

    # The LLM

    def _ask_llm(self, slots: int) -> Asking:
        reading = yield prompt.ask(self._question(slots), self._setup.templates)
        self._analysis = reading.analysis or self._analysis
        chosen: list[Suggestion] = []
        for proposal in reading.proposals:
            fate = "no evaluation was left for it"
            if proposal.path in self._known:
                fate = "it repeats a candidate"
            elif len(chosen) < slots:
                path = self._paths.parse(proposal.path)
                chosen.append(self._suggest(path, "llm", proposal.note, proposal.expected))
                self._own.add(proposal.path)
                self._more += self._paths.edits(path, self._root)
                fate = "scored"
            self._proposed.append((proposal.path, fate))
        self._share.answered(bool(chosen))
        self._history.add("read", [one.path for one in chosen])
        return chosen

    def _question(self, slots: int) -> PathQuestion:
        effects: list[tuple[str, float, float]] = []
        numeric: list[str] = []
        with self._threads.limit(limits=1):
            if self._fit():
                seen = dict.fromkeys(
                    e for t in self._learnt() if (p := self._path_of(t)) for e in self._paths.edits(p, self._root)
                )
                paths = [(edit, path) for edit in seen if (path := self._paths.edited(self._root, [edit]))]
                rows = [self._features(path) for path in (self._paths.whole(self._root), *(p for _, p in paths))]
                means, deviations = self._model.predict(rows)
                effects = [
                    (str(edit), float(mean - means[0]), float(deviation))
                    for (edit, _), mean, deviation in zip(paths, means[1:], deviations[1:], strict=True)
                ]
            if effects and (best := self._best_of_beam()):
                numeric = [str(best)]
        return PathQuestion(
            question=replace(
                self._setup.question,
                trials=tuple(self._trials),
                wanted=min(slots + 1, PROPOSALS),
                slots=slots,
                generation=self._generation,
                used=len(self._trials),
                weights=self._weights,
            ),
            paths=self._paths,
            root=self._root,
            others=self._others(),
            effects=effects,
            numeric=numeric,
            proposed=self._proposed,
            analysis=self._analysis,
        )

    def _observe(self) -> None:
        """Learn what the LLM's paths and the others' are worth: the chance that each beats the best before it."""
        trials = self._learnt()
        fresh, self._scored = trials[self._scored :], len(trials)
        before = [trial for trial in trials[: len(trials) - len(fresh)] if trial.score]
        if not before or not fresh or self._setup.style != "chat" or not self._fit():
            return
        rows = [self._features(p) for t in (*before, *fresh) if (p := self._path_of(t))]
        means, deviations = self._model.predict(rows)
        best = float(means[: len(before)].max())
        chances = probability_of_improvement(means[len(before) :], deviations[len(before) :], best, 1e-9)
        for trial, chance in zip(fresh, chances, strict=True):
            self._share.observe(float(chance) if trial.score else 0.0, trial.candidate.path in self._own)


def _rank(entry: tuple[float, tuple[object, LayerPath]]) -> tuple[float, str]:
    """The sort key of a bound and its path: the highest first, equal ones by their text."""
    return -entry[0], str(entry[1][1])


def moved(edit: Edit) -> list[Edit]:
    """Return an edit with one end, or both, moved by a layer, and with other gains."""
    if edit.kind == ROPE:
        return [rope_edit(factor) for factor in ROPES if factor != edit.factor]
    spans = [(edit.start + a, edit.stop + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
    found = [replace(edit, start=start, stop=stop) for start, stop in spans if 0 <= start < stop]
    if edit.kind == "repeat":
        found += [replace(edit, factor=factor) for factor in DAMPED if factor != edit.factor]
    return found
