"""Optimizers of other libraries, and two simple rules, for `searches.py`.

Each is an `Optimizer` as those of llmevo: it is told the same start rows first. `RIVALS` has all of them by name.
Optuna's TPE and GPSampler and pycma as mergekit-evolve starts it are optimizers of llmevo itself (`tpe`, `gp`,
`mergekit-evolve`, `cma-es`). Optuna's AutoSampler is its GPSampler (`gp`) for fewer than 250 trials without choices.

BoTorch and SMAC are in the extra `benchmarks` of `pyproject.toml`.
"""

import contextlib
import queue
import tempfile
import threading
from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmevo.search.optimizers.base import Asking, Optimizer, Setup
from llmevo.search.optimizers.cma_es import CmaEs
from llmevo.search.optimizers.population import at_least_two
from llmevo.search.trial import Suggestion, Trial

Array = NDArray[np.float64]


class Rival(Optimizer):
    """The base of optimizers of points of the unit cube."""

    origin: str

    def __init__(self, setup: Setup) -> None:
        self.space, self.seed, self.budget = setup.space, setup.seed, setup.budget
        self.random = np.random.default_rng(setup.seed)
        self.told = np.empty((0, len(setup.space.genes)))
        """The points told so far (trials, genes)."""
        self.values = np.empty(0)
        self.errors = np.empty(0)
        """Standard errors of the values; 0 for exact ones."""

    @abstractmethod
    def points(self, size: int) -> Sequence[Array]:
        """Return at most `size` points to score; none if the search has ended."""

    def learn(self, points: Array, values: Array) -> None:
        """Learn from points after the start rows. One that fits its model anew for each point needs no such method."""

    def ask(self, size: int) -> Asking:
        return [Suggestion(self.space.from_unit(point), self.origin) for point in self.points(size)]
        yield  # makes this a generator, as Asking is

    def tell(self, trials: Sequence[Trial]) -> None:
        first = not len(self.values)
        scored = [(self.space.to_unit(t.candidate.genes), t.score) for t in trials if t.score]
        points = np.array([point for point, _ in scored]).reshape(-1, self.told.shape[1])
        values = np.array([score.total for _, score in scored])
        self.told = np.vstack([self.told, points])
        self.values = np.append(self.values, values)
        self.errors = np.append(self.errors, [score.stderr for _, score in scored])
        if not first:
            self.learn(points, values)

    @property
    def best(self) -> Array:
        return self.told[int(np.argmax(self.values))]

    def state(self) -> str:
        return ""  # simulated searches have no log

    def close(self) -> None:
        """End what it has started."""


class Coefficients(Rival):
    """The best coefficient: an even grid of weights that all models have in common; all other genes are as in the
    uniform merge. It ends after `count` evaluations.
    """

    origin = "coefficient"

    def __init__(self, count: int, setup: Setup) -> None:
        super().__init__(setup)
        uniform = self.space.to_unit(self.space.uniform())
        is_weight = np.array([gene.parameter == "weight" for gene in self.space.genes])
        lowest = np.array([gene.to_unit(max(gene.low, 0.0)) for gene in self.space.genes])
        shares = np.arange(1, count + 1) / count
        self._grid = [np.where(is_weight, lowest + share * (1 - lowest), uniform) for share in shares]

    def points(self, size: int) -> Sequence[Array]:
        handed, self._grid = self._grid[:size], self._grid[size:]
        return handed


class AroundBest(Rival):
    """Normal steps from the best-scored point so far, 0.15 of each gene's range."""

    origin = "around-best"
    STEP = 0.15

    def points(self, size: int) -> Sequence[Array]:
        steps = self.STEP * self.random.standard_normal((size, self.told.shape[1]))
        return [*np.clip(self.best + steps, 0.0, 1.0)]


class TunedCmaEs(CmaEs):
    """pycma from the best start row with another first step size and population, in which a generation may be
    smaller than the run's.

    `cma-es/SIGMA/POPULATION` is any of them; `cma-es-tuned` is the best on the landscapes of SIGMA 1/12, 1/6, 1/3 and
    POPULATION 6, 10, 16: see `TUNED`.
    """

    def __init__(self, sigma: float, population: int, setup: Setup) -> None:
        super().__init__(setup)
        self._first, self._size = sigma, population

    def begin(self, start: Array) -> None:
        import cma

        options: dict[str, Any] = {
            "bounds": [0, 1],
            "randn": lambda *shape: self._random.standard_normal(shape),
            "seed": np.nan,  # its own seeding would seed all of numpy
            "popsize": self._size,
            "verbose": -9,
            "verb_log": 0,
        }
        self._strategy = cma.CMAEvolutionStrategy(at_least_two(start), self._first, options)


class _Closed(Exception):
    """The search has ended before the method."""


class Cobyqa(Rival):
    """COBYQA (Ragonneau 2022, https://www.cobyqa.com): a trust region with quadratic models, by SciPy, from the best
    start row; again from the best point when it has converged. The first radius is a sixth of a gene's range.

    SciPy calls the function itself; so it runs in a thread, which waits for the score of each point.
    """

    origin = "cobyqa"
    RADIUS, CONVERGED = 1 / 6, 1e-3

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._points: queue.Queue[Array | BaseException | None] = queue.Queue()
        self._scores: queue.Queue[float | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def points(self, size: int) -> Sequence[Array]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._minimize, daemon=True)
            self._thread.start()
        point = self._points.get()
        if isinstance(point, BaseException):
            raise point
        return [] if point is None else [point]

    def learn(self, points: Array, values: Array) -> None:
        for value in values:
            self._scores.put(float(value))

    def _minimize(self) -> None:
        from scipy.optimize import minimize

        try:
            count = -1
            while count < len(self.values):  # until no new point is asked for
                count = len(self.values)
                minimize(
                    self._cost,
                    self.best,
                    method="COBYQA",
                    bounds=[(0.0, 1.0)] * self.told.shape[1],
                    options={"initial_tr_radius": self.RADIUS, "final_tr_radius": self.CONVERGED},
                )
            self._points.put(None)
        except _Closed:
            pass
        except BaseException as error:  # to be raised where the points are asked for
            self._points.put(error)

    def _cost(self, point: Array) -> float:
        scored = self.space.to_unit(self.space.from_unit(point))
        known = np.flatnonzero((self.told == scored).all(axis=1))
        if len(known):
            return -float(self.values[known[0]])
        self._points.put(point)
        value = self._scores.get()
        if value is None:
            raise _Closed
        return -value

    def close(self) -> None:
        if self._thread:
            self._scores.put(None)
            self._thread.join()


class BoTorch(Rival):
    """The base of BoTorch's methods: one point at a time, in double precision, with the scores' known errors."""

    def _data(self, first: int = 0) -> tuple[Any, Any, Any]:
        """Points, values and the variances of their errors, from the trial `first` on; no variances for exact values,
        whose noise the model infers.
        """
        import torch

        points, values, errors = (torch.tensor(part[first:]) for part in (self.told, self.values, self.errors))
        return points, values[:, None], errors.clamp(min=1e-4)[:, None] ** 2 if errors.any() else None

    @contextlib.contextmanager
    def _seeded(self) -> Generator[None]:
        import warnings

        from botorch import manual_seed

        with manual_seed(int(self.random.integers(2**31))), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of restarts of the fit
            yield


class LogNei(BoTorch):
    """qLogNEI (Ament et al. 2023, https://arxiv.org/abs/2310.20708) with BoTorch's SingleTaskGP, as in its tutorial
    "closed-loop batch, constrained BO": 10 restarts from 512 raw samples.
    """

    origin = "botorch"

    def points(self, size: int) -> Sequence[Array]:
        import torch
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from botorch.models.transforms import Standardize
        from botorch.optim import optimize_acqf
        from botorch.sampling import SobolQMCNormalSampler
        from gpytorch.mlls import ExactMarginalLogLikelihood

        with self._seeded():
            points, values, variances = self._data()
            model = SingleTaskGP(points, values, variances, outcome_transform=Standardize(1))
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            sampler = SobolQMCNormalSampler(torch.Size([128]), seed=int(self.random.integers(2**31)))
            acquisition = qLogNoisyExpectedImprovement(model, points, sampler=sampler, prune_baseline=True)
            bounds = torch.tensor([[0.0], [1.0]], dtype=torch.double).expand(2, points.shape[1])
            options = {"batch_limit": 5, "maxiter": 200}
            found, _ = optimize_acqf(acquisition, bounds, 1, num_restarts=10, raw_samples=512, options=options)
        return [*found.numpy()]


class Turbo(BoTorch):
    """TuRBO-1 (Eriksson et al. 2019, https://arxiv.org/abs/1910.01364) as in BoTorch's tutorial, one point at a time:
    Thompson samples in a trust region around the best point.

    The start rows are its initial design; after a restart it has `RESTARTED` points of a Sobol sequence.
    """

    origin = "turbo"
    FIRST, LEAST, MOST = 0.8, 0.5**7, 1.6
    SUCCESSES = 3  # as in the paper
    RESTARTED = 8

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._failures = max(4, len(setup.space.genes))  # ⌈max(4 / batch, genes / batch)⌉
        self._begin = 0
        self._reset()

    def _reset(self) -> None:
        self._length, self._succeeded, self._failed = self.FIRST, 0, 0
        self._design: list[Array] = []

    def learn(self, points: Array, values: Array) -> None:
        own = self.values[self._begin :]
        before = own[: len(own) - len(values)]
        if self._design or not len(before):
            return
        if values.max() > before.max() + 1e-3 * abs(before.max()):
            self._succeeded, self._failed = self._succeeded + 1, 0
        else:
            self._succeeded, self._failed = 0, self._failed + 1
        if self._succeeded == self.SUCCESSES:
            self._length, self._succeeded = min(2 * self._length, self.MOST), 0
        elif self._failed == self._failures:
            self._length, self._failed = self._length / 2, 0
        if self._length < self.LEAST:
            from scipy.stats import qmc

            self._reset()
            self._begin = len(self.values)
            self._design = [*qmc.Sobol(points.shape[1], rng=self.random).random(self.RESTARTED)]

    def points(self, size: int) -> Sequence[Array]:
        if self._design:
            return [self._design.pop(0)]
        import gpytorch
        import torch
        from botorch.fit import fit_gpytorch_mll
        from botorch.generation import MaxPosteriorSampling
        from botorch.models import SingleTaskGP
        from gpytorch.constraints import Interval
        from gpytorch.kernels import MaternKernel, ScaleKernel
        from gpytorch.likelihoods import GaussianLikelihood
        from gpytorch.mlls import ExactMarginalLogLikelihood
        from torch.quasirandom import SobolEngine

        with self._seeded():
            points, values, variances = self._data(self._begin)
            mean, deviation = values.mean(), values.std().clamp(min=1e-9)
            dim = points.shape[1]
            kernel = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=dim, lengthscale_constraint=Interval(0.005, 4.0)))
            noise: dict[str, Any] = {"likelihood": GaussianLikelihood(noise_constraint=Interval(1e-8, 1e-3))}
            if variances is not None:
                noise = {"train_Yvar": variances / deviation**2}
            scaled = (values - mean) / deviation
            model = SingleTaskGP(points, scaled, covar_module=kernel, outcome_transform=None, **noise)
            with gpytorch.settings.max_cholesky_size(float("inf")):
                fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
                center = points[scaled.argmax()].clone()
                lengths = kernel.base_kernel.lengthscale.squeeze().detach()
                lengths = lengths / lengths.mean()
                lengths = lengths / torch.prod(lengths.pow(1.0 / dim))
                low = torch.clamp(center - lengths * self._length / 2.0, 0.0, 1.0)
                high = torch.clamp(center + lengths * self._length / 2.0, 0.0, 1.0)
                count = min(5000, max(2000, 200 * dim))
                sobol = SobolEngine(dim, scramble=True, seed=int(self.random.integers(2**31)))
                perturbed = low + (high - low) * sobol.draw(count, dtype=torch.double)
                mask = torch.rand(count, dim, dtype=torch.double) <= min(20.0 / dim, 1.0)
                none = torch.where(mask.sum(dim=1) == 0)[0]
                mask[none, torch.randint(0, dim, size=(len(none),))] = True
                candidates = center.expand(count, dim).clone()
                candidates[mask] = perturbed[mask]
                with torch.no_grad():
                    found = MaxPosteriorSampling(model=model, replacement=False)(candidates, num_samples=1)
        return [*found.numpy()]


class Smac(Rival):
    """SMAC3's facade for black boxes of numbers (Lindauer et al. 2022, https://arxiv.org/abs/2109.09831): a Gaussian
    process with expected improvement, and 8 % of its points random. Its initial design is the start rows.
    """

    origin = "smac"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        from ConfigSpace import ConfigurationSpace, Float
        from smac import BlackBoxFacade, Scenario

        self._folder = tempfile.TemporaryDirectory()
        names = [f"x{place:03}" for place in range(self.told.shape[1])]
        self._names, self._configs = names, ConfigurationSpace(seed=setup.seed)
        self._configs.add([Float(name, (0.0, 1.0)) for name in names])
        scenario = Scenario(
            self._configs,
            output_directory=self._folder.name,  # type: ignore[arg-type]
            deterministic=True,
            n_trials=setup.budget,
            seed=setup.seed,
        )
        # A design without a point is refused; the uniform merge is a start row and is not asked for again.
        uniform = self._configuration(self.space.to_unit(self.space.uniform()))
        design = BlackBoxFacade.get_initial_design(scenario, n_configs=0, additional_configs=[uniform])
        self._smac: Any = BlackBoxFacade(
            scenario, self._unused, initial_design=design, overwrite=True, logging_level=False
        )
        self._asked: Any = None

    @staticmethod
    def _unused(config: Any, seed: int) -> float:
        """SMAC wants a function; it is asked and told instead."""
        raise NotImplementedError

    def _configuration(self, point: Array) -> Any:
        from ConfigSpace import Configuration

        values = dict(zip(self._names, map(float, point), strict=True))
        return Configuration(self._configs, values=values)

    def tell(self, trials: Sequence[Trial]) -> None:
        from smac.runhistory.dataclasses import TrialInfo, TrialValue

        before = len(self.values)
        super().tell(trials)
        for point, value in zip(self.told[before:], self.values[before:], strict=True):
            info = self._asked or TrialInfo(self._configuration(point), seed=0)
            self._smac.tell(info, TrialValue(cost=-float(value)), save=False)
            self._asked = None

    def points(self, size: int) -> Sequence[Array]:
        self._asked = self._smac.ask()
        return [np.array([self._asked.config[name] for name in self._names])]

    def close(self) -> None:
        self._folder.cleanup()


TUNED = 1 / 6, 10

RIVALS: dict[str, Callable[[Setup], Optimizer]] = {
    **{f"coefficient-{count}": partial(Coefficients, count) for count in (3, 6, 12)},
    "around-best": AroundBest,
    "cma-es-tuned": partial(TunedCmaEs, *TUNED),
    "cobyqa": Cobyqa,
    "botorch": LogNei,
    "turbo": Turbo,
    "smac": Smac,
}
"""Every rival by its name."""


def rival(name: str) -> Callable[[Setup], Optimizer] | None:
    """Return the rival of this name, `cma-es/SIGMA/POPULATION` among them; None if there is none."""
    kind, *numbers = name.split("/")
    if kind == "cma-es" and len(numbers) == 2:
        return partial(TunedCmaEs, float(numbers[0]), int(numbers[1]))
    return RIVALS.get(name)
