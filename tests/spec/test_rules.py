import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from bessemer.orchestration.room import allowed_sizes
from bessemer.spec.job import JobSpec


def job(**sections: Any) -> JobSpec:
    fields: dict[str, Any] = {
        "name": "a",
        "system": {"name": "biggan", "preset": "tiny"},
        "data": {"path": "x"},
        "training": {"total_kimg": 1000, "batch_size": 32, "slice_size": 16},
    }
    for name, section in sections.items():
        fields[name] = {**fields.get(name, {}), **section}
    return JobSpec.model_validate(fields)


def broken(**sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        job(**sections)
    (error,) = caught.value.errors()
    return str(error["msg"])


sizes = st.integers(1, 400)


@given(batch=sizes, piece=sizes, workers=st.integers(1, 40))
def test_every_fix_that_a_batch_error_names_is_legal(batch: int, piece: int, workers: int) -> None:
    assume(batch % piece or batch // piece % workers)
    training = {"batch_size": batch, "slice_size": piece}
    resources = {"workers": workers}
    text = broken(training=training, resources=resources)
    assert ("training.batch_size:" in text) == bool(batch % piece)
    # "set A to 1 or 2, or B to 3 or 4": each of the values by itself must mend the rule that is reported.
    fixes = re.findall(r"(training\.batch_size|training\.slice_size|resources\.workers) to ([\d]+(?: or [\d]+)?)", text)
    assert fixes
    for field, values in fixes:
        for value in map(int, values.split(" or ")):
            section, name = field.split(".")
            mended = {"training": dict(training), "resources": dict(resources)}
            mended[section][name] = value
            if batch % piece:
                assert mended["training"]["batch_size"] % mended["training"]["slice_size"] == 0
            else:
                job(**mended)


@given(batch=sizes, piece=sizes, workers=st.integers(1, 40))
def test_divisible_batches_are_accepted(batch: int, piece: int, workers: int) -> None:
    whole = batch * piece * workers
    assert (
        job(
            training={"batch_size": whole, "slice_size": piece, "total_kimg": 1e6},
            checkpoint={"every_kimg": 1e5},
            evaluation={"every_kimg": 1e5},
            resources={"workers": workers},
        ).slices
        == whole // piece
    )


def test_a_run_is_at_least_one_batch_long() -> None:
    assert job(training={"total_kimg": 0.032}).training.total_kimg == 0.032
    text = broken(training={"total_kimg": 0.031})
    assert "training.total_kimg: 0.031 is less than one batch of 32 images; set it to 0.032 or more." in text


@pytest.mark.parametrize("section", ["checkpoint", "evaluation"])
def test_nothing_happens_more_often_than_once_per_batch(section: str) -> None:
    job(**{section: {"every_kimg": 0.032}})
    assert f"{section}.every_kimg: 0.01 is less than one batch" in broken(**{section: {"every_kimg": 0.01}})


def test_offloading_needs_a_gpu_and_sharded_states() -> None:
    text = broken(training={"offload": "optimizer"})
    assert "training.offload: optimizer is done by ZeRO, and training.zero_stage 0 is without it; set" in text
    assert "training.offload: optimizer empties a GPU's memory, and on the CPU (resources.gpus_per_worker 0)" in text
    for stage in (1, 2, 3):
        job(training={"offload": "optimizer", "zero_stage": stage}, resources={"gpus_per_worker": 1})


@pytest.mark.parametrize("betas", [[0.0, 1.0], [-0.1, 0.9], [1.5, 0.9], [float("nan"), 0.9]])
def test_betas_outside_zero_to_one_are_refused(betas: list[float]) -> None:
    text = broken(training={"optimizers": {"generator": {"betas": betas}}})
    assert "training.optimizers.generator.betas" in text
    assert "0 <= beta < 1" in text


def test_betas_of_gans_are_accepted() -> None:
    job(training={"optimizers": {"generator": {"betas": [0, 0.999]}}})


@pytest.mark.parametrize("metric", ["fid", "kid_efflite0", "fd_efflite0", "kid_inception"])
def test_metrics_that_say_what_they_are(metric: str) -> None:
    assert job(evaluation={"metrics": [metric]}).evaluation.metrics == (metric,)


@pytest.mark.parametrize(
    ("metric", "fix"),
    [
        ("kid", "'kid_efflite0'"),
        ("FID", "or 'fid'"),
        ("kid-efflite0", "'kid_efflite0'"),
        ("", "'kid_efflite0'"),
        ("fid_efflite0", "'fd_efflite0'"),
    ],
)
def test_metrics_that_hide_their_extractor_are_refused(metric: str, fix: str) -> None:
    text = broken(evaluation={"metrics": [metric]})
    assert f"evaluation.metrics: {metric!r}" in text
    assert fix in text


def test_a_metric_is_listed_once() -> None:
    assert "'fid' is listed 2 times" in broken(evaluation={"metrics": ["fid", "kid_efflite0", "fid"]})


def test_averages_are_stored_at_most_once_per_batch() -> None:
    text = broken(ema={"store_every_kimg": 0.02, "profiles": [0.1]})
    assert "ema.store_every_kimg: 0.02 is less than one batch of 32 images" in text
    job(ema={"store_every_kimg": 0.02})  # nothing is stored


def test_a_profile_is_listed_once() -> None:
    assert "ema.profiles: 0.1 is listed 2 times" in broken(ema={"profiles": [0.1, 0.05, 0.1]})


def test_the_best_checkpoint_needs_its_metric_at_the_same_moments() -> None:
    evaluation = {"metrics": ["kid_efflite0"], "every_kimg": 20}
    for every in (5, 10, 20, 60):
        job(checkpoint={"keep_best": "kid_efflite0", "every_kimg": every}, evaluation=evaluation)
    text = broken(checkpoint={"keep_best": "kid_efflite0", "every_kimg": 30}, evaluation=evaluation)
    assert "checkpoint.keep_best" in text
    assert "make one a multiple of the other" in text
    text = broken(checkpoint={"keep_best": "fid", "every_kimg": 10}, evaluation=evaluation)
    assert "checkpoint.keep_best: 'fid' is not among evaluation.metrics (kid_efflite0)" in text


@pytest.mark.parametrize(("field", "value"), [("stop_after_kimg", 100), ("rollback_at", 2)])
def test_verdicts_need_a_metric(field: str, value: float) -> None:
    assert f"evaluation.{field}: {value} judges the first of evaluation.metrics" in broken(evaluation={field: value})


def test_stalls_are_of_a_metric_and_longer_than_its_interval() -> None:
    assert "alerts.stall_kimg: 100 judges the first of evaluation.metrics" in broken(alerts={"stall_kimg": 100})
    evaluation = {"metrics": ["kid_efflite0"], "every_kimg": 50}
    job(evaluation=evaluation, alerts={"stall_kimg": 50})
    text = broken(evaluation=evaluation, alerts={"stall_kimg": 20})
    assert "alerts.stall_kimg: 20 is less than evaluation.every_kimg 50" in text
    assert "should match pattern '^https?://" in broken(alerts={"webhook": "file:///etc/passwd"})


def test_a_rollback_needs_the_best_checkpoint() -> None:
    evaluation = {"metrics": ["kid_efflite0", "fid"], "rollback_at": 2}
    job(evaluation=evaluation, checkpoint={"keep_best": "kid_efflite0"})
    for keep in (None, "fid"):
        text = broken(evaluation=evaluation, checkpoint={"keep_best": keep})
        assert "evaluation.rollback_at: 2 goes back to the best checkpoint by kid_efflite0" in text


def test_keeping_every_checkpoint_is_no_policy() -> None:
    job(checkpoint={"every_kimg": 10, "keep_every_kimg": 10})
    text = broken(checkpoint={"every_kimg": 10, "keep_every_kimg": 5})
    assert "checkpoint.keep_every_kimg: 5 is less than checkpoint.every_kimg 10" in text


def test_all_broken_rules_are_reported_together() -> None:
    text = broken(training={"slice_size": 12}, evaluation={"metrics": ["kid"], "every_kimg": 0.001})
    fields = [re.findall(r"[a-z]+\.[a-z_]+(?=:)", line)[0] for line in text.splitlines()]
    assert fields == ["training.batch_size", "evaluation.every_kimg", "evaluation.metrics"]


def test_half_precision_needs_a_gpu_and_sees_overflows() -> None:
    job(training={"precision": "fp16"}, resources={"gpus_per_worker": 1})
    assert "training.precision: fp16 takes 15 times as long" in broken(training={"precision": "fp16"})
    text = broken(training={"precision": "fp16", "sanitize_gradients": True}, resources={"gpus_per_worker": 1})
    assert "training.sanitize_gradients: true would hide" in text
    job(training={"precision": "bf16", "sanitize_gradients": True})


def test_scaling_and_its_reference_go_together() -> None:
    job(training={"lr_scaling": "sqrt", "lr_reference_batch": 256})
    assert "training.lr_reference_batch: is not set" in broken(training={"lr_scaling": "linear"})
    assert "256 has no effect" in broken(training={"lr_reference_batch": 256})


def test_a_run_outlasts_its_warm_up() -> None:
    job(training={"total_kimg": 10, "lr_schedule": {"warmup_kimg": 9}})
    text = broken(training={"total_kimg": 10, "lr_schedule": {"warmup_kimg": 10}})
    assert "training.lr_schedule.warmup_kimg: 10 is not less than training.total_kimg 10" in text


def test_rates_fall_between_the_warm_up_and_the_end() -> None:
    schedule = {"warmup_kimg": 10, "decay": "linear", "decay_from_kimg": 10}
    job(training={"lr_schedule": schedule})
    assert "decay_from_kimg: 10 has no effect" in broken(training={"lr_schedule": {**schedule, "decay": "none"}})
    for wrong in (9, 1000):
        text = broken(training={"lr_schedule": {**schedule, "decay_from_kimg": wrong}})
        assert f"decay_from_kimg: {wrong} does not lie between the end of the warm-up (10)" in text
        assert "training.total_kimg (1000)" in text


def test_likelihoods_are_metrics_without_an_extractor() -> None:
    evaluation = {"metrics": ["bits_per_dim"], "held_out": "y", "importance_samples": 10}
    assert job(evaluation=evaluation).evaluation.held_out == "y"
    text = broken(evaluation=evaluation, ema={"batch_norm": "recomputed"})
    assert "ema.batch_norm: recomputed takes BatchNorm statistics from generated images" in text
    job(ema={"batch_norm": "recomputed"})
    text = broken(evaluation={**evaluation, "metrics": ["psnr"]})
    assert "evaluation.importance_samples: 10 has no effect" in text


def test_speeds_are_not_measured_while_training() -> None:
    text = broken(evaluation={"metrics": ["samples_per_s"]})
    assert "'samples_per_s' says nothing while a run trains" in text
    assert "bessemer evaluate RUN -m samples_per_s" in text


def test_steps_that_are_left_out_are_longer_than_clipped_ones() -> None:
    job(training={"gradient_clipping": 10, "skip_gradient_norm": 10})
    text = broken(training={"gradient_clipping": 10, "skip_gradient_norm": 9})
    assert "training.skip_gradient_norm: 9 is less than training.gradient_clipping 10" in text


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://host/runs", "checkpoint.upload: https://host/runs can only be read; name a directory, s3://"),
        ("pipe:cat", "checkpoint.upload: pipe:cat: pipe: runs a shell command"),
        ("s3://", "checkpoint.upload: s3://: is no address in S3; write s3://BUCKET/PREFIX"),
    ],
)
def test_uploads_go_where_something_can_be_written(url: str, message: str) -> None:
    assert message in broken(checkpoint={"upload": url})
    for good in ("s3://bucket/runs", "gs://bucket", "/mnt/backup", "backup", "file:///mnt/backup"):
        job(checkpoint={"upload": good})


@pytest.mark.parametrize(
    ("resources", "training", "message"),
    [
        ({"workers": 3, "min_workers": 4}, {}, r"min_workers: 4 is more than resources\.workers 3; lower it"),
        ({"workers": 6, "min_workers": 5}, {}, r"min_workers: 5 does not divide the 6 slices.*set it to 3 or 6"),
        ({"workers": 2, "min_workers": 1}, {"batch_statistics": "workers"}, r"min_workers: 1 would change the run"),
    ],
)
def test_runs_that_cannot_shrink(resources: dict[str, Any], training: dict[str, Any], message: str) -> None:
    assert re.search(message, broken(resources=resources, training={"batch_size": 96, "slice_size": 16, **training}))


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"workers": 1, "gpus_per_worker": 2}, r"gpus_per_worker: 2 reserves GPUs that nobody uses.*set it to 1"),
        ({"workers": 2, "gpus_per_worker": 0.5}, r"gpus_per_worker: 0\.5 would let some of 2 workers share a GPU"),
    ],
)
def test_a_worker_has_one_gpu_of_its_own(resources: dict[str, Any], message: str) -> None:
    training = {"batch_size": 32, "slice_size": 16}
    assert re.search(message, broken(resources=resources, training=training))
    job(resources={"workers": 1, "gpus_per_worker": 0.5}, training=training)
    job(resources={"workers": 2, "gpus_per_worker": 1}, training=training)


def test_numbers_of_workers_that_a_run_may_shrink_to() -> None:
    def sizes_of(**resources: int) -> list[int]:
        return allowed_sizes(job(resources=resources, training={"batch_size": 192, "slice_size": 16}))

    assert sizes_of(workers=6) == [6]
    assert sizes_of(workers=6, min_workers=2) == [6, 4, 3, 2]
    assert sizes_of(workers=12, min_workers=1) == [12, 6, 4, 3, 2, 1]
