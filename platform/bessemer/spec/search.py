"""SearchSpec: one YAML file that says which job is varied, how, by what it is judged, and when to stop.

The docstring under each field is its help text, as in :mod:`bessemer.spec.job`. Rules that span several fields live in
:mod:`bessemer.spec.search_rules`; what a space of hyper-parameters can do, in :mod:`bessemer.spec.space`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bessemer.spec.job import Name, PositiveKimg, Section

__all__ = [
    "BudgetSpec",
    "DimensionSpec",
    "FinalSpec",
    "ObjectiveSpec",
    "SchedulerSpec",
    "SearchSpec",
    "SearcherSpec",
]

_Number = Annotated[int | float, Field(allow_inf_nan=False)]


class DimensionSpec(Section):
    """One field of the job that is varied: a list of choices, or a range."""

    choice: tuple[Any, ...] | None = None
    """Values to choose from."""
    uniform: tuple[_Number, _Number] | None = None
    """Range in which every value is as likely as any other; whole numbers where both ends are."""
    loguniform: tuple[_Number, _Number] | None = None
    """Range in which every order of magnitude is as likely as any other; whole numbers where both ends are."""
    step: Annotated[int | float, Field(gt=0, allow_inf_nan=False)] | None = None
    """With `uniform`: only values that are so many steps above the lower end."""
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Vary this field only where others of the space, which have `choice`, take one of these values."""


class ObjectiveSpec(Section):
    """By what trials are judged, and when."""

    metric: str
    """Metric with its extractor, such as `kid_efflite0`, or `bits_per_dim`; `bessemer evaluate --help` lists them."""
    mode: Literal["min", "max"] = "min"
    """Which way is better."""
    rungs_kimg: Annotated[tuple[PositiveKimg, ...], Field(min_length=1)]
    """Moments on the image clock at which every trial that gets there is judged; the last is the length of a trial."""
    samples: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = (1000,)
    """Generated images at each rung, the last number for those that follow: few at first, and more for those that were
    promoted. The seeds are the same for all trials."""
    also: tuple[str, ...] = ()
    """Further objectives, less is better: other metrics, or `device_hours`. The searcher then looks for the Pareto
    front; the scheduler still judges by `metric`."""


class FinalSpec(Section):
    """How finalists are judged once more when all trials are over, as far as the search has such a final.

    For metrics that are too dear, or too biased, for the few samples of a rung.
    """

    metric: str
    """Metric with its extractor, such as `fid` or `fd_efflite0`; that of the objective only with more samples."""
    mode: Literal["min", "max"] = "min"
    """Which way is better."""
    top: Annotated[int, Field(ge=2)] = 3
    """Finalists: so many of the trials that came furthest, the best by the objective."""
    samples: Annotated[int, Field(ge=2)] = 10_000
    """Generated images of each draw."""
    draws: Annotated[int, Field(ge=1)] = 3
    """Draws of images for each finalist and seed, with latents that no rung has seen and that are the same for all
    finalists. The value is the mean over them; several also say its standard error, where the metric has none."""


class BudgetSpec(Section):
    """What the search may take. Limits other than `trials` are looked at whenever a trial reaches a rung."""

    trials: Annotated[int, Field(ge=1, le=100_000)]
    """Points of the space that are tried at most; the size of the population with `pbt` and `pb2`."""
    kimg: PositiveKimg | None = None
    """Thousands of images over all trials; no limit when unset."""
    device_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Hours times workers over all trials; no limit when unset."""
    hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Hours that the search itself goes on, interruptions not counted; no limit when unset."""


class SchedulerSpec(Section):
    """Who decides at a rung which trials go on."""

    name: Literal["none", "asha", "hyperband", "bohb", "median", "pbt", "pb2"] = "asha"
    """`asha` keeps the best of each rung; `hyperband` and `bohb` do so with several first rungs; `median` stops what is
    worse than the median; `pbt` and `pb2` let bad trials go on from copies of good ones with other settings."""
    reduction: Annotated[float, Field(gt=1, le=100)] = 3.0
    """With `asha`, `hyperband` and `bohb`: one in so many goes on."""
    standard_errors: Annotated[float, Field(ge=0, le=10)] = 1.0
    """With `asha`, a trial goes on where it is no more than so many standard errors of its own worse than the cut; with
    `pbt` and `pb2`, it copies only where it is more than so many worse than the donor."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """With `pbt` and `pb2`: share of the population that copies, and share that is copied from."""
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """With `pbt`: probability that a setting is drawn anew rather than moved by a fifth."""


class SearcherSpec(Section):
    """Who chooses the points of the space."""

    name: Literal["random", "grid", "tpe", "gp", "bohb"] = "tpe"
    """`tpe` and `gp` (Gaussian process) are Optuna's; `bohb` belongs to the scheduler `bohb`."""
    startup: Annotated[int, Field(ge=1)] = 10
    """Random points before `tpe` and `gp` trust what they know."""


class SearchSpec(Section):
    """A whole search. `bessemer search FILE` runs it."""

    name: Name
    """Name of the search; its directory is named after it."""
    job: str
    """Job file that is varied; a relative path starts at the directory of the search file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Fields of the job, with dots, that differ from the file in all trials."""
    space: Annotated[dict[str, DimensionSpec], Field(min_length=1)]
    """Fields of the job, with dots, that are varied, such as `training.optimizers.generator.lr`."""
    objective: ObjectiveSpec
    final: FinalSpec | None = None
    """How finalists are judged once more; the last rung has the last word when unset."""
    budget: BudgetSpec
    scheduler: SchedulerSpec = SchedulerSpec()
    searcher: SearcherSpec = SearcherSpec()
    workers: Annotated[int, Field(ge=1)] = 1
    """DeepSpeed workers of each trial. A trial gets all of them at once, or waits."""
    concurrency: Annotated[int, Field(ge=1)] | None = None
    """Trials that run side by side at most; as many as the cluster holds when unset."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1)] | None = None
    """Seeds with which each point is trained; it is judged by the mean. The job's own seed when unset."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Times that a trial whose workers were lost goes on from its newest checkpoint before it counts as failed."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the searcher and of the scheduler: the same results lead to the same decisions."""

    @model_validator(mode="after")
    def _check_rules(self) -> SearchSpec:
        from bessemer.spec.search_rules import check_search

        check_search(self)
        return self

    @property
    def length_kimg(self) -> float:
        """Length of a trial that is never stopped."""
        return self.objective.rungs_kimg[-1]

    def samples_at(self, rung: int) -> int:
        """Generated images at a rung, counted from 0."""
        samples = self.objective.samples
        return samples[min(rung, len(samples) - 1)]
