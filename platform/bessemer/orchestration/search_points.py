"""Who chooses the points of a search's space. Each knows a search by its table, and so survives its driver's death.

`random` and `grid` are functions of the seed and the trial's number. The others are Optuna's samplers and hpbandster's
model; they are told of every result in the order of the journal, and seeded anew for every point.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from random import Random
from typing import Any, Protocol

from bessemer.errors import MachineError
from bessemer.spec.search import SearchSpec
from bessemer.spec.space import Point, Space, encode, is_whole
from bessemer.tracking.search_journal import Result, SearchTable, Trial

__all__ = ["Points", "check_searcher", "points_of"]

_PACKAGES = {"tpe": ("optuna",), "gp": ("optuna", "scipy"), "bohb": ("hpbandster", "ConfigSpace")}


class Points(Protocol):
    """Chooses points, one for each trial."""

    def choose(self, number: int, attempt: int) -> Point | None:
        """The point of a new trial; None if there are no more.

        Args:
            number: of the trial.
            attempt: 0, or how many points were refused before it.
        """
        ...

    def adopt(self, trial: Trial) -> None:
        """Take in a trial that an earlier session began, with what is known of it."""
        ...

    def judged(self, trial: Trial, result: Result) -> None:
        """Take in a result."""
        ...

    def over(self, trial: Trial) -> None:
        """Take in that a trial is over, in whatever way."""
        ...

    def refused(self, number: int) -> None:
        """The last point of this number is no legal job."""
        ...


def check_searcher(search: SearchSpec) -> None:
    """Check that the searcher's packages are installed.

    Raises:
        MachineError: names them.
    """
    name = search.searcher.name
    missing = [package for package in _PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        extra = "bohb" if name == "bohb" else "search"
        raise MachineError(
            f"searcher.name: {name} needs {' and '.join(missing)}; pip install 'bessemer[{extra}]', or write random."
        )


def points_of(search: SearchSpec, table: SearchTable) -> Points:
    """The searcher that a search asks for, with everything that happened so far."""
    space = Space(search.space)
    name = search.searcher.name
    points: Points
    if name == "random":
        points = _Drawn(space, search.seed)
    elif name == "grid":
        points = _Listed(space)
    elif name == "bohb":
        points = _Bohb(space, search)
    else:
        points = _Optuna(space, search)
    for trial in table.trials.values():
        points.adopt(trial)
    return points


class _Forgetful:
    """A searcher that results do not change."""

    def adopt(self, trial: Trial) -> None:
        """Nothing to learn."""

    def judged(self, trial: Trial, result: Result) -> None:
        """Nothing to learn."""

    def over(self, trial: Trial) -> None:
        """Nothing to learn."""

    def refused(self, number: int) -> None:
        """Nothing to learn."""


class _Drawn(_Forgetful):
    """Random points."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed

    def choose(self, number: int, attempt: int) -> Point | None:
        return self._space.draw(Random(f"{self._seed}/{number}/{attempt}"))


class _Listed(_Forgetful):
    """All points of a grid, in order; refused ones are left out."""

    def __init__(self, space: Space) -> None:
        # Not a generator: Tune pickles a searcher when its session begins.
        self._left = {encode(point): point for point in space.grid()}

    def adopt(self, trial: Trial) -> None:
        self._left.pop(encode(trial.point), None)

    def choose(self, number: int, attempt: int) -> Point | None:  # noqa: ARG002
        return self._left.pop(next(iter(self._left))) if self._left else None


class _Optuna:
    """Optuna's samplers on a study that holds every trial of the journal."""

    def __init__(self, space: Space, search: SearchSpec) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._search, self._optuna = space, search, optuna
        objective = search.objective
        directions: Any = ["maximize" if objective.mode == "max" else "minimize", *("minimize" for _ in objective.also)]
        self._study = optuna.create_study(directions=directions)
        self._numbers: dict[int, int] = {}
        """Number of a trial -> number in Optuna's study."""
        self._asked: dict[int, Any] = {}

    def _sampler(self, number: int, attempt: int) -> Any:
        samplers, name = self._optuna.samplers, self._search.searcher.name
        seed = Random(f"{self._search.seed}/{number}/{attempt}").randrange(2**32)
        startup = self._search.searcher.startup
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            if name == "gp":
                return samplers.GPSampler(seed=seed, n_startup_trials=startup)
            # Trials that are under way count as bad, so that others try something else meanwhile.
            return samplers.TPESampler(
                seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True
            )

    def choose(self, number: int, attempt: int) -> Point | None:
        self._study.sampler = self._sampler(number, attempt)
        trial = self._study.ask()
        self._numbers[number], self._asked[number] = trial.number, trial
        point: Point = {}
        for field, d in self._space.dimensions.items():
            if not self._space.is_active(field, point):
                continue
            if d.choice is not None:
                point[field] = json.loads(trial.suggest_categorical(field, [encode(v) for v in d.choice]))
                continue
            low, high = d.uniform or d.loguniform or (0, 0)
            log = d.loguniform is not None
            if is_whole(d):
                point[field] = trial.suggest_int(field, int(low), int(high), step=int(d.step or 1), log=log)
            else:
                value = trial.suggest_float(field, low, high, step=d.step, log=log)
                point[field] = self._space.within(field, value)
        return point

    def _distributions(self, point: Point) -> dict[str, Any]:
        kinds, found = self._optuna.distributions, {}
        for field in point:
            d = self._space.dimensions[field]
            if d.choice is not None:
                found[field] = kinds.CategoricalDistribution([encode(v) for v in d.choice])
                continue
            low, high = d.uniform or d.loguniform or (0, 0)
            log = d.loguniform is not None
            if is_whole(d):
                found[field] = kinds.IntDistribution(int(low), int(high), step=int(d.step or 1), log=log)
            else:
                found[field] = kinds.FloatDistribution(low, high, step=d.step, log=log)
        return found

    def adopt(self, trial: Trial) -> None:
        state, values = self._outcome(trial) if trial.is_over else (self._optuna.trial.TrialState.RUNNING, None)
        params = {f: encode(v) if self._space.dimensions[f].choice is not None else v for f, v in trial.point.items()}
        self._study.add_trial(
            self._optuna.trial.create_trial(
                state=state,
                values=values,
                params=params,
                distributions=self._distributions(trial.point),
                intermediate_values=self._course(trial),
            )
        )
        frozen = self._study.trials[-1]
        self._numbers[trial.number] = frozen.number
        if not trial.is_over:
            self._asked[trial.number] = self._optuna.trial.Trial(self._study, frozen._trial_id)

    def _course(self, trial: Trial) -> dict[int, float]:
        return {r.rung: r.value for r in trial.results} if not self._search.objective.also else {}

    def _outcome(self, trial: Trial) -> tuple[Any, list[float] | None]:
        """How Optuna should see a trial that is over."""
        states, last = self._optuna.trial.TrialState, trial.last
        if trial.state == "failed" or last is None:
            return states.FAIL, None
        values = [last.value]
        for name in self._search.objective.also:
            hours = trial.seconds * self._search.workers / 3600
            values.append(hours if name == "device_hours" else last.values[name])
        # With one objective, a trial that was stopped counts for how far it came and how good it was there.
        stopped = trial.state == "stopped" and len(values) == 1
        return (states.PRUNED, None) if stopped else (states.COMPLETE, values)

    def judged(self, trial: Trial, result: Result) -> None:
        if not self._search.objective.also:
            self._asked[trial.number].report(result.value, result.rung)

    def over(self, trial: Trial) -> None:
        state, values = self._outcome(trial)
        self._study.tell(self._numbers[trial.number], values, state=state)

    def refused(self, number: int) -> None:
        self._study.tell(self._numbers[number], state=self._optuna.trial.TrialState.FAIL)


class _Bohb:
    """The model of BOHB (Falkner et al. 2018, arXiv:1807.01774), by hpbandster; results at rung n have budget n + 1."""

    def __init__(self, space: Space, search: SearchSpec) -> None:
        import ConfigSpace
        from hpbandster.optimizers.config_generators.bohb import BOHB

        self._space, self._sign = space, -1.0 if search.objective.mode == "max" else 1.0
        configurations: Any = ConfigSpace.ConfigurationSpace(seed=search.seed)
        for field, d in space.dimensions.items():
            low, high = d.uniform or d.loguniform or (0, 0)
            log = d.loguniform is not None
            if d.choice is not None:
                configurations.add(ConfigSpace.CategoricalHyperparameter(field, [encode(v) for v in d.choice]))
            elif is_whole(d):
                configurations.add(ConfigSpace.UniformIntegerHyperparameter(field, int(low), int(high), log=log))
            else:
                configurations.add(ConfigSpace.UniformFloatHyperparameter(field, low, high, log=log))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # hpbandster calls ConfigSpace by old names
            self._model = BOHB(configurations)

    def choose(self, number: int, attempt: int) -> Point | None:
        import numpy as np

        seed = Random(f"{number}/{attempt}").randrange(2**32)
        np.random.seed(seed)  # noqa: NPY002  # hpbandster draws from the global generator
        self._model.configspace.seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            found, _ = self._model.get_config(None)
        return {
            field: json.loads(found[field]) if d.choice is not None else self._space.within(field, float(found[field]))
            for field, d in self._space.dimensions.items()
        }

    def adopt(self, trial: Trial) -> None:
        for result in trial.results:
            self.judged(trial, result)

    def judged(self, trial: Trial, result: Result) -> None:
        config = {
            field: encode(value) if self._space.dimensions[field].choice is not None else value
            for field, value in trial.point.items()
        }
        job = _Judged({"budget": result.rung + 1, "config": config}, self._sign * result.value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same, and densities of few points
            self._model.new_result(job)

    def over(self, trial: Trial) -> None:
        """The model learns from results alone."""

    def refused(self, number: int) -> None:
        """The model learns from results alone."""


class _Judged:
    """What hpbandster takes for a finished job."""

    exception = None

    def __init__(self, kwargs: dict[str, Any], loss: float) -> None:
        self.kwargs, self.result = kwargs, {"loss": loss}
