"""`bessemer data`: make data sets, check them, look at them."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.cli.output import echo_json, human_bytes, progress, table

if TYPE_CHECKING:
    from bessemer.data.manifest import Manifest
    from bessemer.data.packing.pack import Runner

__all__ = ["app", "index", "info", "pack", "verify"]

_CLASSES = 20
"""Most rows in the table of classes."""

app = typer.Typer(help="Make, check and describe the data sets that jobs read.", no_args_is_help=True)


@app.callback()
def _data() -> None:
    """Make, check and describe the data sets that jobs read."""


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder or archive (tar, tar.gz, tar.xz, tar.zst, tar.bz2, zip) of images, arrays, Parquet files, "
            "WebDataset shards, or the files of CIFAR or MNIST; or the word `digits`: handwritten digits that come "
            "with scikit-learn.",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Directory to make; jobs name it as data.path.")],
    size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Centre-crop images to a square and resize it to SIZE x SIZE pixels. Needed where sizes differ."
        ),
    ] = None,
    resize: Annotated[
        str,
        typer.Option(
            metavar="lanczos|box|bicubic|none", help="Filter for --size; `none` cuts out the centre without scaling."
        ),
    ] = "lanczos",
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="RGB|L",
            help="Convert all images to colour (RGB) or grey (L); transparency is laid over white. Needed where they "
            "are mixed.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split to take where the top folders are splits (train, test, val, ...), or `all`.",
            show_default="the training split",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(("images", "pairs", "domains", "clips", "audio", "bits")),
            help="What a sample is; docs/data.md says how each is laid out.",
            show_default="what the names in SRC say, else images",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|folders|none",
            help="Where classes come from: a json or csv file, the folders, or none.",
            show_default="dataset.json, labels beside the images, or folders, whichever there is",
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut clips into pieces of LENGTH frames, or sound into pieces of LENGTH samples; what is left at "
            "the end of each is not taken.",
            show_default="all have one length",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take at most LIMIT images of each class, the first by name.")
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Size of a shard in MiB, about.")] = 128,
    workers: Annotated[
        int | None, typer.Option("--workers", "-j", min=1, help="Processes.", show_default="the number of cores")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Spread the work over a Ray cluster: its address, `auto` for the one of this machine, `local` to "
            "start one here. Its nodes must share the file system of SRC and DST.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the data set at DST.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Pack images, clips, sound or bits into a data set that jobs can train on.

    SRC holds images as class/name.jpg (also png, webp, bmp); images in no class folder make up one class. Folders
    around the classes are skipped, and of train/test/val folders the training split is taken. Other kinds of sources:
    docs/data.md.

    Every image is checked by decoding it. JPEG and PNG images that fit are stored byte for byte; others are
    converted and stored as PNG. DST appears when it is complete: WebDataset tar shards, an index and manifest.json.
    When packing was interrupted, the same command goes on where it stopped.

    Example: bessemer data pack photos/ datasets/photos --size 64 --mode RGB
    """
    from bessemer.data.packing import pack as packing

    start = time.monotonic()
    workers = workers or len(os.sched_getaffinity(0))
    with progress("packing") as advance, _runner(ray, workers) as runner:
        manifest = packing.pack(
            source,
            destination,
            kind=packing.kind_named(kind),
            size=size,
            resize=packing.resize_named(resize),
            mode=packing.mode_named(mode),
            split=split,
            labels=labels,
            length=length,
            limit=limit,
            workers=workers,
            runner=runner,
            shard_bytes=shard_size << 20,
            overwrite=overwrite,
            progress=advance,
        )
    seconds = time.monotonic() - start
    if as_json:
        echo_json(_summary(manifest, destination, seconds))
    else:
        _print_summary(manifest, destination, seconds)


@app.command()
def index(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory with shards, *.tar.")],
    workers: Annotated[
        int | None, typer.Option("--workers", "-j", min=1, help="Processes.", show_default="the number of cores")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Make a data set of WebDataset shards that others wrote: write index.npy and manifest.json beside them.

    Every header's checksum is checked, every member accounted for, every image decoded. The images must be JPEG or PNG,
    square, of one size and colour mode; shards with others are packed anew: bessemer data pack DIR DST.
    """
    from bessemer.data.packing.foreign import index_shards

    start = time.monotonic()
    with progress("indexing") as advance:
        manifest = index_shards(
            directory, workers=workers or len(os.sched_getaffinity(0)), overwrite=overwrite, progress=advance
        )
    seconds = time.monotonic() - start
    if as_json:
        echo_json(_summary(manifest, directory, seconds))
    else:
        _print_summary(manifest, directory, seconds)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A data set.")],
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="Also check the headers of the shards, and crc32, label and image of every sample."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prove that a data set is as it was packed: sizes and sha256 of all files; exit with 1 if something is damaged."""
    from dataclasses import asdict

    from bessemer.data.manifest import Manifest
    from bessemer.data.packing.verify import verify as find_faults

    with progress("verifying") as advance:
        faults = find_faults(directory, deep=deep, progress=advance)
    if as_json:
        echo_json([asdict(fault) for fault in faults])
    else:
        for fault in faults:
            typer.echo(f"{fault.file}: {fault.problem}")
        if not faults:
            manifest = Manifest.load(directory)
            typer.echo(f"ok: {manifest.samples} samples in {len(manifest.shards)} shards, hash {manifest.hash}")
    if faults:
        if not as_json:
            typer.echo("Copy these files again from where they were packed, or pack the data set anew.", err=True)
        raise typer.Exit(1)


@app.command()
def info(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A data set.")],
    grid: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a picture of samples, a row per class, as PNG.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Decode at most IMAGES images for pixel statistics.")] = 10_000,
    every: Annotated[bool, typer.Option("--all", help="Decode all images.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a data set: class balance, sizes, pixel statistics, duplicates, and what of it ruins runs."""
    from dataclasses import asdict

    from bessemer.data.fields import NOUNS, describe
    from bessemer.data.packing.examine import examine, sample_images

    with progress("examining") as advance:
        found = examine(directory, None if every else images, advance)
    if grid is not None:
        from bessemer.evaluation.grid import save_png, tile

        rows = min(10, max(4, len(found.classes)))
        save_png(grid, tile(sample_images(directory, rows, rows), rows))
    if as_json:
        echo_json({**asdict(found), "superfluous": found.superfluous, "grid": grid})
        return
    smallest, median, largest = map(human_bytes, found.image_bytes)
    lines = {
        "samples": f"{found.samples} {NOUNS[found.kind]}",
        "shards": f"{found.shards}, {human_bytes(found.bytes)}; samples of {smallest} to {largest}, median {median}",
    }
    for one in found.fields:
        numbers = f"mean {_numbers(one.mean)}, std {_numbers(one.std)} (of {found.examined})"
        lines[one.name] = f"{describe(one.name, one.shape, one.rate)} as {one.encoding}; {numbers}"
    lines["copies"] = f"{found.superfluous} samples are exact copies of others"
    for name, value in lines.items():
        typer.echo(f"{name:8} {value}")
    typer.echo()
    ordered = sorted(found.classes.items(), key=lambda item: -item[1])
    shown = ordered if len(ordered) <= _CLASSES else [*ordered[: _CLASSES // 2], *ordered[-_CLASSES // 2 :]]
    table(("CLASS", "SAMPLES", "SHARE"), [(name, count, f"{count / found.samples:.1%}") for name, count in shown])
    if len(shown) < len(ordered):
        typer.echo(f"({len(ordered) - len(shown)} classes between the largest and the smallest are left out; --json)")
    for warning in found.warnings:
        typer.secho(f"warning: {warning}.", err=True, fg="yellow")
    if grid is not None:
        typer.echo(f"grid     {grid}")


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _runner(address: str | None, workers: int) -> AbstractContextManager[Runner | None]:
    if address is None:
        return nullcontext()
    from bessemer.orchestration.packing import ray_runner

    return ray_runner(address, workers)


def _summary(manifest: Manifest, destination: Path, seconds: float) -> dict[str, object]:
    return {
        "path": destination,
        "samples": manifest.samples,
        "classes": dict(zip(manifest.classes, manifest.class_counts, strict=True)),
        "kind": manifest.kind,
        "fields": [one.model_dump() for one in manifest.batch_fields],
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "hash": manifest.hash,
        "packing": manifest.packing.model_dump(),
        "seconds": round(seconds, 3),
    }


def _print_summary(manifest: Manifest, destination: Path, seconds: float) -> None:
    packing = manifest.packing
    from bessemer.data.fields import NOUNS, describe

    fields = {one.name: describe(one.name, one.shape, one.rate) for one in manifest.batch_fields}
    shown = ", ".join(f"{name} {shape}" if len(fields) > 1 else shape for name, shape in fields.items())
    size = human_bytes(sum(shard.bytes for shard in manifest.shards))
    fewest, most = min(manifest.class_counts), max(manifest.class_counts)
    lines = {
        "samples": f"{manifest.samples} {NOUNS[manifest.kind]}, {shown}",
        "classes": f"{len(manifest.classes)}, of {fewest if fewest == most else f'{fewest} to {most}'} samples each",
        "stored": f"{packing.passed_through} byte for byte, {manifest.samples - packing.passed_through} as new files",
        "shards": f"{len(manifest.shards)}, {size}",
    }
    if packing.split is not None:
        others = [name for name in packing.splits if name != packing.split]
        note = f" (not taken: {', '.join(others)})" if others and packing.split != "all" else ""
        lines["split"] = packing.split + note
    if packing.ignored:
        lines["ignored"] = ", ".join(f"{count} {ending}" for ending, count in packing.ignored.items())
    lines["time"] = f"{seconds:.1f} s"
    lines["where"] = str(destination)
    for name, value in lines.items():
        typer.echo(f"{name:8} {value}")
