"""JobSpec: one YAML file that says everything about a run.

The docstring under each field is its help text: it appears in ``bessemer schema`` and in editors. Rules that
span several fields live in :mod:`bessemer.spec.rules`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "AlertsSpec",
    "CheckpointSpec",
    "DataSpec",
    "DiversitySpec",
    "EmaSpec",
    "EvaluationSpec",
    "GuardsSpec",
    "JobSpec",
    "LrScheduleSpec",
    "Name",
    "OptimizerSpec",
    "PositiveKimg",
    "ResourcesSpec",
    "SaturationSpec",
    "Section",
    "SpectralSpec",
    "SystemSpec",
    "TrackingSpec",
    "TrainingSpec",
]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
PositiveKimg = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of a spec: immutable, unknown fields refused, field docstrings become descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class SystemSpec(Section):
    """Which generative system is trained, and with which numbers."""

    name: Name
    """Name of the system, as `bessemer systems` lists it."""
    preset: Name
    """Preset of the system, as `bessemer systems show NAME` lists them."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of the system's configuration that differ from the preset."""


class DataSpec(Section):
    """Which packed data set is read, and how."""

    path: str
    """Directory with shards and manifest.json, as `bessemer data pack` writes it, or the URL of a copy of it, such as
    `https://host/set`, `s3://bucket/set` or `gs://bucket/set`."""
    mirror: bool = False
    """Flip each image left-right with probability one half."""
    threads: Annotated[int, Field(ge=0, le=64)] = 1
    """Decoder threads per worker that read ahead; 0 decodes in the training thread."""
    cache: Literal["auto", "none", "decoded"] = "auto"
    """Keep decoded images in memory: `auto` does so for sets below 512 MiB per worker."""
    cache_dir: str | None = None
    """Directory on each node for shards from a URL, shared by its workers and by runs; `~/.cache/bessemer/shards` when
    unset."""
    cache_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 50.0
    """Size of that directory at most; the shards that were read longest ago make room for others."""
    on_bad_sample: Literal["stop", "quarantine"] = "stop"
    """What happens when a sample is damaged: the run stops, or another of its class takes its place for good."""
    max_bad_samples: Annotated[int, Field(ge=1)] = 100
    """Damaged samples that each worker replaces before it stops."""
    allow_pipe: bool = False
    """Allow `path` to be `pipe:COMMAND`, a shell command that each worker runs with a file's name in place of `{name}`.
    Whoever writes the job can then run anything."""


class OptimizerSpec(Section):
    """Overrides of the system's own optimizer settings for one network; unset fields keep them."""

    name: Literal["adam", "adamax", "rmsprop", "sgd", "lamb", "lars"] | None = None
    """Algorithm; `lamb` and `lars` are for large batches."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Learning rate."""
    betas: tuple[float, float] | None = None
    """Decay rates of Adam, Adamax and LAMB."""
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Term that keeps the denominator from zero."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """L2 penalty."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Momentum of RMSprop, SGD and LARS."""
    trust: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """LARS's trust coefficient."""


class LrScheduleSpec(Section):
    """How the learning rates of all networks move on the image clock."""

    warmup_kimg: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """They rise linearly from zero until then."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How they fall until `training.total_kimg`."""
    decay_from_kimg: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Where they begin to fall; at the end of the warm-up when unset."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the full learning rate that is left at the end of the decay."""


class TrainingSpec(Section):
    """Batch, length, precision and sharding."""

    total_kimg: PositiveKimg
    """Length of the run in thousands of real images."""
    batch_size: Annotated[int, Field(ge=1)]
    """Images per optimizer step over all workers."""
    slice_size: Annotated[int, Field(ge=1)]
    """Images per forward pass; the unit of accumulation, of randomness and of batch statistics."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    offload: Literal["none", "optimizer"] = "none"
    """What ZeRO 1 to 3 keep in the host's memory instead of the GPU's: nothing, or optimizer states, the fp32 weights
    that they belong to and the averages; the CPU computes the step then. Not with second-order losses."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass; weights and optimizer states are always fp32. fp16 scales each network's loss."""
    channels_last: bool = False
    """Hand images to the networks in the memory layout that convolutions on tensor cores prefer."""
    compile: tuple[Name, ...] = ()
    """Networks that torch.compile compiles; not those with a second-order loss."""
    batch_statistics: Literal["slice", "workers"] = "slice"
    """Batch normalisation over one slice, or over the slices that all workers compute at the same moment; then the run
    depends on the number of workers."""
    gradient_clipping: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest gradient norm of a network; none when unset."""
    skip_gradient_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Leave out steps whose gradient norm is larger than this, like those that are not finite; none when unset."""
    sanitize_gradients: bool = False
    """Replace NaN by 0 and ±infinity by ±1e5 in averaged gradients, as StyleGAN's loop does, instead of skipping the
    step."""
    optimizers: dict[Name, OptimizerSpec] = Field(default_factory=dict)
    """Per network: optimizer settings that differ from the system's preset."""
    lr_schedule: LrScheduleSpec = LrScheduleSpec()
    """Warm-up and decay."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiply learning rates by batch_size / lr_reference_batch, or by its square root."""
    lr_reference_batch: Annotated[int, Field(ge=1)] | None = None
    """Batch size that the learning rates were chosen for."""
    threads_per_worker: Annotated[int, Field(ge=1, le=256)] = 1
    """CPU threads of torch in each worker."""
    log_every_kimg: PositiveKimg = 0.5
    """Distance between two lines of metrics in the journal."""


class EmaSpec(Section):
    """Moving averages of the weights. Samples and evaluations are drawn from an exponential one."""

    half_life_kimg: PositiveKimg = 10.0
    """Images after which an old weight counts half."""
    rampup: Annotated[float, Field(gt=0, le=1)] | None = 0.05
    """Early in a run the half-life is at most this share of the images seen; unset for none."""
    batch_norm: Literal["copied", "recomputed"] = "copied"
    """BatchNorm statistics of snapshots: those of training, or those of 64 passes with the averaged weights."""
    profiles: tuple[Annotated[float, Field(ge=0.01, le=0.28)], ...] = ()
    """Relative widths of power-function averages to store, such as [0.05, 0.1], for `bessemer ema reconstruct`."""
    store_every_kimg: PositiveKimg = 50.0
    """Distance between two moments at which the profiles are stored."""


Action = Literal["warn", "rollback", "stop"]


class SaturationSpec(Section):
    """The discriminator wins: scores of real and generated images lie apart, and its loss is at its floor."""

    scores_apart: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """Mean score of real images minus that of generated ones, at least; below 1 where squared errors draw the scores to
    1 and 0 (CycleGAN)."""
    loss: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.02
    """Loss of the update `discriminator`, at most; losses of critics lie far below zero and never count."""
    for_kimg: PositiveKimg = 10.0
    """How long both must hold at every line of metrics."""
    action: Action = "warn"
    """Write an event, go back to a checkpoint from before it began, or stop."""


class DiversitySpec(Section):
    """Generated images of one class are nearly alike, by the distance of pixels."""

    least: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Mean distance of two generated images of a class over that of two real ones."""
    for_kimg: PositiveKimg = 10.0
    """How long it must be less at every look."""
    action: Action = "warn"
    """Write an event, go back to a checkpoint from before it began, or stop."""


class SpectralSpec(Section):
    """The largest singular value of a weight grows fast."""

    growth: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 10.0
    """Ratio to its value at the beginning of the time below, or to 1 where that is more."""
    within_kimg: PositiveKimg = 50.0
    """Time in which it grows so much."""
    action: Action = "warn"
    """Write an event, go back to a checkpoint from before it began, or stop."""


class GuardsSpec(Section):
    """What happens when the numbers of a run go wrong."""

    max_skips: Annotated[int, Field(ge=0)] = 3
    """Updates in a row that are left out, as not finite (loss or gradient) or by `training.skip_gradient_norm`; the
    next makes the run go back."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 2
    """Times that the run goes back to its last checkpoint, with another random stream, before it stops."""
    rollback_lr_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """All learning rates are multiplied by this at each rollback."""
    compare_workers: bool = True
    """Compare weights and buffers over the workers before each checkpoint; the run stops where they differ."""
    every_kimg: PositiveKimg = 2.0
    """Distance between two looks at samples and weights, for signs of collapse of adversarial systems."""
    saturation: SaturationSpec | None = SaturationSpec()
    """See below; null for never."""
    diversity: DiversitySpec | None = DiversitySpec()
    """See below; null for never."""
    spectral: SpectralSpec | None = SpectralSpec()
    """See below; null for never."""


class CheckpointSpec(Section):
    """When a state to resume from is written."""

    every_kimg: PositiveKimg = 50.0
    """Distance between two checkpoints."""
    background: bool = True
    """Write the files while training goes on; takes host memory for one copy of the state."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints that are kept; older ones are deleted unless another rule keeps them."""
    keep_every_kimg: PositiveKimg | None = None
    """Keep the first checkpoint of each stretch of this length for ever; none when unset."""
    keep_best: str | None = None
    """Metric of the evaluation, such as `kid_efflite0`, whose best checkpoint is kept too; none when unset."""
    upload: str | None = None
    """Directory or URL (`s3://bucket/runs`, `gs://...`) to which each checkpoint is copied in the background, below the
    name of the run, and from which a run that lost its machine goes on; none when unset."""
    upload_grace_s: Annotated[float, Field(ge=0, le=3600)] = 20.0
    """Seconds that a run waits for its last upload when it was asked to stop."""


class EvaluationSpec(Section):
    """Metrics during training. A metric's name holds its feature extractor."""

    metrics: tuple[str, ...] = ()
    """Names such as `kid_efflite0`, `fd_efflite0`, `fid`, `bits_per_dim` or, of translated pairs, `psnr`;
    `bessemer evaluate --help` lists them."""
    every_kimg: PositiveKimg = 50.0
    """Distance between two evaluations; the final generator is always evaluated."""
    untrained: bool = True
    """Evaluate the untrained generator too."""
    samples: Annotated[int, Field(ge=2)] = 10_000
    """Generated images per evaluation; the reference takes as many real ones, or all where there are fewer. So do
    likelihoods."""
    batch_size: Annotated[int, Field(ge=1)] = 50
    """Images per forward pass of the feature extractor."""
    truncation: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Truncation of the latents while evaluating; unset for none."""
    held_out: str | None = None
    """Packed set of images that are not trained on, for `bits_per_dim` and `cas_...`, and for translations to begin
    with; those of `data.path` when unset."""
    importance_samples: Annotated[int, Field(ge=1)] = 1
    """Draws of the latents per image for `bits_per_dim`; 1 for the ELBO, more for a tighter bound."""
    grid: Annotated[int, Field(ge=1, le=32)] = 8
    """Rows and columns of the sample grid that each evaluation draws."""
    beside: bool = False
    """A process of its own evaluates snapshots while training goes on; otherwise the workers do, and training waits."""
    backlog: Annotated[int, Field(ge=1)] = 2
    """With `beside`: snapshots that may wait for the evaluator; of more, the older ones are left out."""
    stop_after_kimg: PositiveKimg | None = None
    """Stop the run early when its first metric has not improved for this long, by more than its standard error."""
    rollback_at: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Go back to the best checkpoint when the first metric is more than this many times its best; counts as one of
    `guards.max_rollbacks`. With `beside`, where the run goes back then depends on how fast the evaluator is."""


class TrackingSpec(Section):
    """Where the journal is mirrored to."""

    mlflow: bool = True
    """Mirror the journal to MLflow; the journal itself is always written."""
    uri: str = "sqlite:///mlflow.db"
    """MLflow tracking URI; a relative sqlite path is taken from the runs directory."""
    experiment: str = "bessemer"
    """MLflow experiment."""
    registry: bool = False
    """When the run has finished, copy its newest and its best snapshot into MLflow's model registry, under the job's
    name, as `latest` and `best`. `bessemer register RUN` does it at any time."""


class AlertsSpec(Section):
    """Of what, and whom, to tell while the run goes on. Alerts are always logged, and events in the journal."""

    stall_kimg: PositiveKimg | None = None
    """The first metric has not improved for this long, by more than its standard error; unset for never."""
    throughput_drop: Annotated[float, Field(gt=0, lt=1)] | None = 0.5
    """Images per second have fallen by this share below their median; null for never."""
    restarts_per_hour: Annotated[int, Field(ge=1)] | None = 3
    """Workers were lost this many times within an hour; null for never."""
    collapse: bool = True
    """A guard suspects collapse, or the run went back to a checkpoint."""
    failure: bool = True
    """The run failed."""
    file: str | None = None
    """File to which each alert is appended as one line of JSON, on the machine that drives the run."""
    webhook: Annotated[str, Field(pattern=r"^https?://[^\s/]+")] | None = None
    """Address to which each alert is posted as JSON; its `text` is what chat services show."""

    @property
    def any_rule(self) -> bool:
        """Whether there is anything to watch for."""
        return self.collapse or self.failure or any((self.stall_kimg, self.throughput_drop, self.restarts_per_hour))


class ResourcesSpec(Section):
    """What the run takes from the cluster."""

    workers: Annotated[int, Field(ge=1)] = 1
    """DeepSpeed workers; must divide the number of slices."""
    min_workers: Annotated[int | None, Field(ge=1)] = None
    """Fewest workers that the run goes on with while nodes are missing; unset waits until all are there again."""
    wait_s: Annotated[float, Field(ge=0)] = 300.0
    """Seconds that the run waits for nodes with room for its workers before it says what is missing and ends."""
    placement: Literal["pack", "spread"] = "pack"
    """Workers on as few nodes as possible, or on as many."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """CPU cores that Ray reserves per worker."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves per worker; 0 trains on the CPU with gloo."""
    evaluator_cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPU cores that Ray reserves for the evaluator, with `evaluation.beside`."""
    evaluator_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for the evaluator; 0 evaluates on the CPU."""
    spares: bool = True
    """On a cluster, keep a process beside each worker that has imported everything (0.5 GB): losses cost less time."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times in a row, without a new checkpoint in between, that lost workers are replaced before the run gives up."""
    address: str | None = None
    """Address of a Ray cluster to join; unset takes RAY_ADDRESS, or starts one on this machine."""


class JobSpec(Section):
    """A whole job. `bessemer train JOB` runs it."""

    name: Name
    """Name of the job; runs are named after it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every random number of the run is a function of this seed."""
    system: SystemSpec
    data: DataSpec
    training: TrainingSpec
    ema: EmaSpec = EmaSpec()
    guards: GuardsSpec = GuardsSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    tracking: TrackingSpec = TrackingSpec()
    alerts: AlertsSpec = AlertsSpec()
    resources: ResourcesSpec = ResourcesSpec()

    @model_validator(mode="after")
    def _check_rules(self) -> JobSpec:
        from bessemer.spec.rules import check_job

        check_job(self)
        return self

    @property
    def cpus(self) -> float:
        """CPU cores that the run reserves."""
        evaluator = self.resources.evaluator_cpus if self.evaluation.beside else 0.0
        return self.resources.workers * self.resources.cpus_per_worker + evaluator

    @property
    def gpus(self) -> float:
        """GPUs that the run reserves."""
        evaluator = self.resources.evaluator_gpus if self.evaluation.beside else 0.0
        return self.resources.workers * self.resources.gpus_per_worker + evaluator

    @property
    def least_workers(self) -> int:
        """Workers without which the run waits."""
        least = self.resources.min_workers
        return self.resources.workers if least is None else least

    @property
    def slices(self) -> int:
        """Slices per optimizer step, over all workers."""
        return self.training.batch_size // self.training.slice_size
