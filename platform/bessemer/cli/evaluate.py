"""`bessemer evaluate` and `bessemer compare-sets`: how good are these images?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.locate import run_directory, snapshot_directory
from bessemer.evaluation.names import describe_metrics

if TYPE_CHECKING:
    from bessemer.evaluation.images import RealImages
    from bessemer.evaluation.likelihood import LikelihoodRecord
    from bessemer.evaluation.records import EvaluationRecord
    from bessemer.evaluation.speed import SpeedRecord
    from bessemer.orchestration.run_directory import RunDirectory

    Record = EvaluationRecord | LikelihoodRecord | SpeedRecord

__all__ = ["compare_sets", "evaluate"]

_DEFAULT = ("kid_efflite0", "fd_efflite0")

Metrics = Annotated[
    list[str] | None,
    typer.Option("--metrics", "-m", help=f"Names, with commas or repeated: {describe_metrics()}."),
]
Real = Annotated[
    int | None,
    typer.Option(
        "--real", min=2, help="Real images to compare with. Default: as many as were generated, or all of a folder's."
    ),
]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0. Default: a GPU if there is one.")]
Figure = Annotated[
    Path | None,
    typer.Option(help="PNG file to write with the pairs of a memorised_... metric: image left, nearest real right."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the records, with their protocol and details, as JSON.")]


def evaluate(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN|SNAPSHOT|FOLDER",
            help="Run directory or name, a snapshot's directory, or images: a folder, an archive, a packed data set.",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(help="Real images: packed data set, folder or archive. Default: the data of the run's job."),
    ] = None,
    metrics: Metrics = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", "-n", min=2, help="Images to generate, or to take. Default: the job's, or all."),
    ] = None,
    real: Real = None,
    balance: Annotated[
        str, typer.Option(metavar="data|uniform", help="Classes of generated images: as in the data, or equally many.")
    ] = "data",
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the latents. Default: that of the job.")] = None,
    truncation: Annotated[
        float | None, typer.Option(min=0.001, help="Truncation of the latents. Default: that of the job.")
    ] = None,
    importance_samples: Annotated[
        int | None, typer.Option(min=1, help="Draws of the latents per image for bits_per_dim. Default: the job's.")
    ] = None,
    snapshot: Annotated[
        str | None, typer.Option(help="Snapshot of the run, such as kimg-000012.800. Default: the newest.")
    ] = None,
    figure: Figure = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Compare generated images with real ones; what is said of a run also goes into its journal.

    Each number is kept with its protocol: extractor, sample counts, reference, seed, truncation and weights. Metrics
    that end in _efflite0 and _pixels work offline; others need weights: bessemer extractors.

    Example: bessemer evaluate others/images --against datasets/mine -m kid_efflite0,recall_efflite0
    """
    from bessemer.errors import SpecError
    from bessemer.evaluation.names import SPEEDS, parse_metric, split_metrics

    names = _names(metrics)
    compared, likelihoods, targets = split_metrics(name for name in names if name not in SPEEDS)
    for name in compared:
        parse_metric(name)
    if balance not in ("data", "uniform"):
        raise SpecError(f"--balance {balance}: is neither data nor uniform.")
    if _is_images(what):
        for name in names:
            if name in SPEEDS or name in likelihoods or name in targets:
                raise SpecError(f"--metrics {name}: is asked of a system, and {what} is images; leave it out.")
        given = {"--snapshot": snapshot, "--seed": seed, "--truncation": truncation}
        for option, value in given.items():
            if value is not None:
                raise SpecError(f"{option}: {what} holds images that are there already; leave {option} out.")
        if against is None:
            raise SpecError(f"--against: is missing; name the real images to compare {what} with.")
        _compare(what, against, names or list(_DEFAULT), samples, real, figure, device, json)
        return
    run, place = _weights(what, snapshot)
    _evaluate_weights(
        run, place, against, names, samples, real, balance, seed, truncation, importance_samples, figure, device, json
    )


def compare_sets(
    images: Annotated[
        str, typer.Argument(metavar="A", help="Images to judge: a folder, an archive or a packed data set.")
    ],
    against: Annotated[str, typer.Argument(metavar="B", help="Images to compare them with, in the same forms.")],
    metrics: Metrics = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", min=2, help="Images of A to take, a fixed choice. Default: all.")
    ] = None,
    real: Annotated[
        int | None, typer.Option("--real", min=2, help="Images of B to take, a fixed choice. Default: all.")
    ] = None,
    paired: Annotated[
        bool,
        typer.Option("--paired", help="Image by image, in the order of classes and names: PSNR and SSIM of all pairs."),
    ] = False,
    lpips: Annotated[
        bool, typer.Option("--lpips", help="With --paired: LPIPS too; its weights: bessemer extractors.")
    ] = False,
    figure: Figure = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Compare two sets of images, such as two folders, a data set and its copy, or images and their reconstructions.

    Images may differ in size: every extractor resizes them. Features are kept, so that a second look costs nothing.
    """
    if paired:
        from bessemer.errors import SpecError

        given = {"--metrics": metrics, "--samples": samples, "--real": real, "--figure": figure}
        for option, value in given.items():
            if value is not None:
                raise SpecError(f"{option}: does not go with --paired, which compares all pairs by PSNR and SSIM.")
        _compare_pairs(images, against, lpips, device, json)
        return
    if lpips:
        from bessemer.errors import SpecError

        raise SpecError("--lpips: is a distance of two images; add --paired.")
    _compare(images, against, _names(metrics) or list(_DEFAULT), samples, real, figure, device, json)


def _evaluate_weights(
    run: RunDirectory | None,
    place: Path,
    against: str | None,
    names: Sequence[str],
    samples: int | None,
    real: int | None,
    balance: Any,
    seed: int | None,
    truncation: float | None,
    importance_samples: int | None,
    figure: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    from bessemer.errors import EvaluationError, SpecError
    from bessemer.evaluation.names import SPEEDS, split_metrics
    from bessemer.spec.job import EvaluationSpec

    job = run.job() if run else None
    spec = job.evaluation if job else EvaluationSpec()
    data = against or (job.data.path if job else None)
    if data is None:
        raise SpecError(f"--against: is missing; {place} lies in no run, so name the real images to compare with.")
    names = names or list(spec.metrics) or list(_DEFAULT)
    _check_figure(figure, names)
    speeds = [name for name in names if name in SPEEDS]
    asked = split_metrics(name for name in names if name not in SPEEDS)

    from bessemer.cli.output import progress
    from bessemer.evaluation.failures import noted
    from bessemer.evaluation.images import field_images, open_images
    from bessemer.evaluation.inputs import inputs_for
    from bessemer.evaluation.judging import judge_weights
    from bessemer.evaluation.pairs import draw_one
    from bessemer.evaluation.records import EvaluationRecord
    from bessemer.evaluation.speed import measure_speed
    from bessemer.systems.snapshot import load_snapshot

    device = device or _device()
    system, info = load_snapshot(place, device)
    count = samples or spec.samples
    others = against or spec.held_out or data
    if job is not None and system.given:  # translations begin with the job's own images, whatever they are compared to
        others = spec.held_out or job.data.path
    protocol: dict[str, Any] = {
        "seed": info.seed if seed is None else seed,
        "truncation": spec.truncation if truncation is None else truncation,
        "balance": balance,
        "device": device,
    }
    found: list[Record] = []
    failures: list[str] = []
    with (
        open_images(data) as dataset,
        open_images(others) as held_out,
        progress(place.name) as advance,
    ):
        found += judge_weights(
            system,
            info,
            dataset,
            held_out,
            asked,
            failures,
            samples=count,
            importance_samples=importance_samples or spec.importance_samples,
            progress=lambda _, done, total: advance(done, total),
            real=real,
            batch_size=spec.batch_size,
            **protocol,
        )
        compared = [record for record in found if isinstance(record, EvaluationRecord)]
        if figure is not None and compared:
            with noted(failures):
                inputs = inputs_for(system, held_out, count)
                drawn = draw_one(system, info, count, **protocol, inputs=inputs)
                _write_figure(figure, compared, drawn, field_images(dataset, system.sample_field))
    protocol.pop("balance")
    found += measure_speed(system, info, speeds, batch_size=spec.batch_size, **protocol)
    if run is not None:
        for record in found:
            run.journal.write("evaluation", info.nimg, **record.as_dict())
    _print(found, as_json, nimg=info.nimg)
    if failures:
        raise EvaluationError("\n".join(failures))


def _compare(
    images: str,
    against: str,
    names: Sequence[str],
    samples: int | None,
    real: int | None,
    figure: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    _check_figure(figure, names)
    from bessemer.cli.output import progress
    from bessemer.evaluation.evaluate import compare_images
    from bessemer.evaluation.images import open_images

    with open_images(images) as a, open_images(against) as b, progress(images) as advance:
        records = compare_images(
            a,
            b,
            names,
            samples=samples,
            real=real,
            device=device or _device(),
            progress=lambda _, done, total: advance(done, total),
        )
        if figure is not None:
            _write_figure(figure, records, _reader(a), b)
    _print(records, as_json)


def _compare_pairs(images: str, against: str, lpips: bool, device: str | None, as_json: bool) -> None:
    from bessemer.cli.output import echo_json, table
    from bessemer.evaluation.images import open_images
    from bessemer.evaluation.lpips import get_lpips
    from bessemer.evaluation.reconstruction import compare_pairs

    device = device or _device()
    perceptual = get_lpips(device) if lpips else None
    with open_images(images) as a, open_images(against) as b:
        found = compare_pairs(a, b, lpips=perceptual, device=device)
    if as_json:
        echo_json(found.as_dict())
    else:
        headers = ("psnr", "ssim", *(["lpips"] if lpips else []), "pairs", "equal pairs")
        table(headers, [(found.psnr, found.ssim, *([found.lpips] if lpips else []), found.pairs, found.equal)])


def _names(metrics: Sequence[str] | None) -> list[str]:
    return list(dict.fromkeys(name for given in metrics or () for name in given.split(",") if name))


def _is_images(what: str) -> bool:
    """Whether `what` is images, and neither a run nor a snapshot."""
    path = Path(what)
    is_weights = any((path / name).is_file() for name in ("run.json", "snapshot.json"))
    return not is_weights and (path.exists() or "://" in what or what == "digits")


def _weights(what: str, snapshot: str | None) -> tuple[RunDirectory | None, Path]:
    """The run, where there is one, and the snapshot."""
    from bessemer.errors import SpecError
    from bessemer.orchestration.run_directory import RunDirectory

    place = Path(what)
    if not (place / "snapshot.json").is_file():
        run = RunDirectory.open(run_directory(what))
        return run, snapshot_directory(run.path, snapshot)
    if snapshot is not None:
        raise SpecError(f"--snapshot {snapshot}: {what} is a snapshot itself; leave --snapshot out.")
    above = place.absolute().parent.parent
    return (RunDirectory.open(above) if (above / "run.json").is_file() else None), place


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_figure(figure: Path | None, names: Sequence[str]) -> None:
    from bessemer.errors import SpecError

    if figure is not None and not any(name.startswith("memorised_") for name in names):
        raise SpecError("--figure: shows the pairs of a memorisation check; add one, such as -m memorised_pixels.")


def _reader(images: RealImages) -> Callable[[int], Any]:
    import numpy as np

    return lambda number: images.read(np.array([number]))[0]


def _write_figure(
    figure: Path, records: Sequence[EvaluationRecord], generated: Callable[[int], Any], real: RealImages
) -> None:
    from bessemer.errors import MachineError
    from bessemer.evaluation.grid import save_png
    from bessemer.evaluation.pairs import pair_figure

    pairs = next(record.details["pairs"] for record in records if "pairs" in record.details)
    try:
        save_png(figure, pair_figure(pairs, generated, _reader(real)))
    except OSError as e:
        raise MachineError(f"{figure}: cannot be written ({e.strerror}); choose another place with --figure.") from None


def _print(records: Sequence[Record], as_json: bool, nimg: int | None = None) -> None:
    from bessemer.cli.output import echo_json, table

    clock = {} if nimg is None else {"nimg": nimg}
    if as_json:
        echo_json([{**clock, **record.as_dict()} for record in records])
        return
    headers = ["metric", "value", "standard error", "better", "samples", "real images", "kimg", "seconds"]
    rows: list[list[object]] = [
        [
            r.metric,
            r.value,
            r.standard_error,
            "higher" if getattr(r, "higher_is_better", False) else "lower",
            r.samples,
            getattr(r, "reference_samples", None if hasattr(r, "hardware") else r.samples),
            None if nimg is None else nimg / 1000,
            round(r.seconds, 1),
        ]
        for r in records
    ]
    table(headers, rows)
