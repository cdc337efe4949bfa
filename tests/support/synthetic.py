"""Logs of any size, through the events' own classes: what a search might have written, in a second instead of a day."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from llmevo.run.log import events
from llmevo.run.log.storage import LOG
from llmevo.search.genome import Genome
from llmevo.search.space import SearchSpace

TASKS = ("toy_sums", "toy_dates", "toy_words")
GENERATION = 10
LATEST = {f"{task}_heldout": 40 for task in TASKS}
QUESTIONS = 50


class Synthetic:
    """A finished run over a landscape that is known: gene g of task t counts `slopes[t, g]`."""

    def __init__(
        self, candidates: int = 40, slices: int = 2, models: int = 2, said: str = "", seed: int = 0, items: bool = True
    ) -> None:
        """`said` is put in every free text: notes, replies, problems, questions, reasons, names of models."""
        self.random = np.random.default_rng(seed)
        self.said, self.items, self.seed = said, items, seed
        names = [f"org/expert-{place}{'/' + said if said else ''}" for place in range(models)]
        self.config: dict[str, Any] = {
            "genome": {
                "base_model": "org/base",
                "models": [f"org/expert-{place}" for place in range(models)],
                "merge_method": "task_arithmetic",
                "layer_granularity": 2,
            },
            "tasks": [{"name": task, "weight": 1 / 3} for task in TASKS],
            "heldout": [{"name": task, "weight": 1 / 3} for task in LATEST],
            "search": {"optimizer": "llm", "budget": candidates, "seed": seed},
        }
        self.names = names
        self.space = SearchSpace(Genome.model_validate(self.config["genome"]), 2 * slices)
        self.slopes = self.random.normal(0, 0.5, (len(TASKS), len(self.space.genes))) / np.sqrt(len(self.space.genes))
        self.log: list[events.Event] = [self._started()]
        self.best: tuple[float, int] = (-1.0, -1)
        start = [("parent", self.space.parent(model), self.space.names[model]) for model in self.space.merged]
        self._generation(0, [*start, ("uniform", self.space.clamp(self.space.uniform()), "")])
        while (left := candidates - sum(isinstance(event, events.Evaluated | events.Failed) for event in self.log)) > 0:
            number = sum(isinstance(event, events.Told) for event in self.log)
            points = [self.space.from_unit(p) for p in self.random.random((min(left, GENERATION), len(self.slopes[0])))]
            self._prompt(number, points[0])
            own = [("llm", points[0], f"more of the first {said}")]
            self._generation(number, [*own, *(("gaussian", point, "expected 0.51") for point in points[1:])])
        self._finish()

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG).write_text("".join(event.model_dump_json(by_alias=True) + "\n" for event in self.log))
        return folder

    def _started(self) -> events.RunStarted:
        said = self.said
        questions = {task: [(f"{task} {n}? {said}", f"{n} {said}") for n in range(40)] for task in LATEST}
        return events.RunStarted(
            config=self.config,
            root="/secret/place",
            prompts={"chat_user.j2": f"Propose. {said}"},
            versions={"llmevo": "0.1.0"},
            sources=[
                {"reference": name, "revision": None, "checksum": "ab", "licence": said or "mit"} for name in self.names
            ],
            seed=self.seed,
            genes=[gene.described() for gene in self.space.genes],
            layers=2 * len(self.space.slices),
            items=QUESTIONS * len(TASKS),
            heldout_items=sum(LATEST.values()),
            proposer="openai",
            style="chat",
            texts={"heldout": questions} if self.items else {},
        )

    def _generation(self, number: int, rows: list[tuple[str, dict[str, float], str]]) -> None:
        first = sum(len(event.candidates) for event in self.log if isinstance(event, events.Asked))
        asked: list[dict[str, Any]] = [
            {
                "id": first + n,
                "origin": origin,
                "genes": genes,
                "recipe": self.space.decode(genes).as_dict(),
                "note": note,
            }
            for n, (origin, genes, note) in enumerate(rows)
        ]
        self.log.append(events.Asked(generation=number, candidates=asked))
        for candidate in asked:
            if number and candidate["id"] % 17 == 16:
                failed = events.Failed(candidate=candidate["id"], reason=f"NaN {self.said}", seconds={"evaluate": 1.0})
                self.log.append(failed)
                continue
            scored = self._scored(candidate["genes"], TASKS, QUESTIONS)
            self.log.append(events.Evaluated(candidate=candidate["id"], **scored))
            self.best = max(self.best, (scored["score"], candidate["id"]))
        self.log.append(events.Told(generation=number, state="0", sigma=0.3 / (1 + number), best=0, trust=0.25))

    def _scored(self, genes: dict[str, float], tasks: Any, count: int) -> dict[str, Any]:
        unit = self.space.to_unit(genes)
        chances = np.clip(0.5 + self.slopes @ (unit - 0.5), 0.02, 0.98)
        answers = {
            task: (self.random.random(count) < chance).astype(int) for task, chance in zip(tasks, chances, strict=True)
        }
        errors = {task: float(np.std(of, ddof=1) / np.sqrt(count)) for task, of in answers.items()}
        return {
            "score": float(np.mean([of.mean() for of in answers.values()])),
            "stderr": float(np.sqrt(sum(error**2 for error in errors.values()))) / len(answers),
            "tasks": {t: {"acc,none": float(of.mean()), "acc_stderr,none": errors[t]} for t, of in answers.items()},
            "items": count * len(answers),
            "item_scores": {task: of.tolist() for task, of in answers.items()} if self.items else {},
            "seconds": {"merge": 1.0, "evaluate": 5.0},
        }

    def _prompt(self, number: int, genes: dict[str, float]) -> None:
        """The LLM proposes this point, hundredth by hundredth, and predicts 0.6; the point becomes what can be said."""
        width = len(self.space.genes) // len(self.space.slices)
        table = [round(100 * value) for value in genes.values()]
        genes |= {name: number / 100 for name, number in zip(genes, table, strict=True)}
        rows = [table[place : place + width] for place in range(0, len(table), width)]
        proposal = {"kind": "explore", "genome": rows, "reason": "more of the first", "predicted_score": 0.6}
        self.log.append(
            events.Prompted(
                generation=number,
                model=f"gpt {self.said}",
                style="chat",
                messages=[{"role": "user", "content": f"What next? {self.said} " + "x" * 4000}],
                reply=json.dumps({"analysis": self.said, "proposals": [proposal]}),
                tokens={"prompt": 1000, "completion": 200},
                cost=0.01,
                seconds=2.0,
                problems=[f"odd {self.said}"] if self.said else [],
                analysis=self.said,
                used=1,
            )
        )

    def _finish(self) -> None:
        asked = [c for event in self.log if isinstance(event, events.Asked) for c in event.candidates]
        base = {gene.name: 0.0 for gene in self.space.genes}
        rows: list[tuple[str, str, int | None, dict[str, float]]] = [("base", "base", None, base)]
        rows += [
            (c["note"] or "uniform", c["origin"], c["id"], c["genes"])
            for c in asked
            if c["origin"] in ("parent", "uniform")
        ]
        rows.append(("best", "best", self.best[1], asked[self.best[1]]["genes"]))
        for name, kind, candidate, genes in rows:
            scored = self._scored(genes, LATEST, 40)
            replies = (
                {task: [f"{name} says {n} {self.said}" for n in range(40)] for task in LATEST} if self.items else {}
            )
            self.log.append(events.HeldOut(row=name, kind=kind, candidate=candidate, replies=replies, **scored))
        kinds: list[str] = ["prompts", "answered", "lost", "unreadable", "capped", "repairs", "used"]
        proposals = dict.fromkeys(kinds, 1)
        finished = events.RunFinished(best=self.best[1], search_score=self.best[0], heldout=None, proposals=proposals)
        self.log.append(finished)
