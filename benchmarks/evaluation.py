"""Evaluation beside clean-fid and torch-fidelity: the same features, files and network, one CPU thread.

Goals: a Frechet distance from 2048-d features takes at most 1/5 of clean-fid's time, reading and resizing images at
most 1/3, and the whole path from files to features, with the same EfficientNet-Lite0, at most 1/1.5 of both
libraries'. All sides must find the same distance to 1e-3.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Ratio, alternate, finish, parse_options, ratio
from _images import real_images, write_png
from numpy.typing import NDArray

from bessemer.evaluation.cleanfid_import import import_cleanfid
from bessemer.evaluation.efflite0 import load_network
from bessemer.evaluation.evaluate import compare_images
from bessemer.evaluation.images import open_images
from bessemer.evaluation.metrics import frechet_distance
from bessemer.evaluation.resize import resize_bicubic

cleanfid = import_cleanfid("fid")
import torch_fidelity  # noqa: E402 - it imports torchvision, which import_cleanfid has mended
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # noqa: E402
from torch_fidelity.utils import (  # noqa: E402
    create_feature_extractor,
    extract_featuresdict_from_input_id_cached,
)

Features = NDArray[np.float32]

values: dict[str, list[float]] = {}


def timed(name: str, work: Callable[[], float]) -> Callable[[], float]:
    """Seconds of `work`, whose value is noted."""

    def run() -> float:
        begin = time.perf_counter()
        value = work()
        seconds = time.perf_counter() - begin
        values.setdefault(name, []).append(float(value))
        return seconds

    return run


def from_features(images: int, dimension: int) -> dict[str, Callable[[], float]]:
    """A distance of two sets of correlated features."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(dimension, dimension)) / math.sqrt(dimension)
    x, y = (np.maximum(rng.normal(size=(images, dimension)) @ mixing + s, 0).astype(np.float32) for s in (0.1, 0.2))

    def fidelity() -> float:
        statistics = [fid_features_to_statistics(torch.from_numpy(side)) for side in (x, y)]
        return float(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])

    return {
        "features/bessemer": timed("features/bessemer", lambda: frechet_distance(x, y)),
        "features/clean-fid": timed("features/clean-fid", lambda: cleanfid.fid_from_feats(x, y)),
        "features/torch-fidelity": timed("features/torch-fidelity", fidelity),
    }


def resizing(folder: Path) -> dict[str, Callable[[], float]]:
    """From files to batches of 299 pixels, without a network; the value is the mean over all pixels."""

    def ours() -> float:
        total, count = 0.0, 0
        with open_images(folder) as images:
            for ids in np.array_split(np.arange(len(images)), -(-len(images) // 16)):
                batch = resize_bicubic(torch.from_numpy(images.read(ids)), 299)
                total, count = total + float(batch.mean()) * len(ids), count + len(ids)
        return total / count

    def theirs() -> float:
        total, count = 0.0, 0
        data = cleanfid.ResizeDataset(sorted(folder.iterdir()), mode="clean")
        for batch in torch.utils.data.DataLoader(data, batch_size=16, num_workers=0):
            total, count = total + float(batch.mean()) * len(batch), count + len(batch)
        return total / count

    return {
        "resize/bessemer": timed("resize/bessemer", ours),
        "resize/clean-fid": timed("resize/clean-fid", theirs),
    }


def network() -> Callable[[torch.Tensor], torch.Tensor]:
    """The package's own EfficientNet-Lite0, as a person would hand it to the other libraries."""
    plain, _ = load_network()

    @torch.no_grad()
    def features(x: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = plain.extract_features((x - 127) / 128)
        return maps.mean((2, 3))

    return features


class _Registered(torch_fidelity.FeatureExtractorBase):  # type: ignore[misc]
    """The same network in torch-fidelity's form."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self._features = network()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("1280",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:  # noqa: ARG004 - the name is theirs
        return "1280"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self._features(resize_bicubic(x, 224)),)


def whole_path(first: Path, second: Path, caches: Path) -> dict[str, Callable[[], float]]:
    """From two folders to their features, and for us to the distance too.

    The others' distance is left out of their time: with few images it would take longer than their network, and with
    many it does not count.
    """
    features, number = network(), itertools.count()
    resize = cleanfid.make_resizer("PIL", False, "bicubic", (224, 224))
    torch_fidelity.register_feature_extractor("efflite0", _Registered)
    extractor = create_feature_extractor("efflite0", ["1280"], cuda=False, verbose=False)

    def ours() -> float:
        with open_images(first) as a, open_images(second) as b:
            [record] = compare_images(a, b, ["fd_efflite0"], cache_dir=caches / str(next(number)))
        return record.value

    def clean(folder: Path) -> Features:
        found: Features = cleanfid.get_folder_features(
            str(folder),
            features,
            num_workers=0,
            batch_size=16,
            device=torch.device("cpu"),
            custom_fn_resize=resize,
            verbose=False,
        )
        return found

    def fidelity(folder: Path) -> Features:
        found = extract_featuresdict_from_input_id_cached(
            1, extractor, input1=str(folder), cuda=False, cache=False, batch_size=16, verbose=False
        )
        return np.asarray(found["1280"])

    def theirs(name: str, extract: Callable[[Path], Features]) -> Callable[[], float]:
        def run() -> float:
            begin = time.perf_counter()
            pair = extract(first), extract(second)
            seconds = time.perf_counter() - begin
            values.setdefault(name, []).append(frechet_distance(*pair))
            return seconds

        return run

    return {
        "path/bessemer": timed("path/bessemer", ours),
        "path/clean-fid": theirs("path/clean-fid", clean),
        "path/torch-fidelity": theirs("path/torch-fidelity", fidelity),
    }


def run() -> int:
    """Measure, print, write."""
    options = parse_options(__doc__)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    count, rounds = (16, 1) if options.quick else (48, 3)
    name, images, _ = real_images(2 * count)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = Path(place) / "a", Path(place) / "b"
        for folder, part in zip(folders, (images[:count], images[count:]), strict=True):
            write_png(folder, part)
        shape = (300, 128) if options.quick else (5000, 2048)
        seconds |= alternate(from_features(*shape), 1, warm_up=0)
        seconds |= alternate(resizing(folders[0]), rounds)
        seconds |= alternate(whole_path(*folders, Path(place) / "caches"), max(rounds - 1, 1), warm_up=0)
    found = []
    for part, goal in (("features", 1 / 5), ("resize", 1 / 3), ("path", 1 / 1.5)):
        for other in ("clean-fid", "torch-fidelity"):
            if f"{part}/{other}" in seconds:
                theirs = seconds[f"{part}/{other}"]
                stated = None if part == "features" and other == "torch-fidelity" else goal
                found.append(ratio(f"{part}/{other}", seconds[f"{part}/bessemer"], theirs, stated))
    for part in ("features", "resize", "path"):
        ours = values[f"{part}/bessemer"][-1]
        apart = max(abs(v[-1] - ours) / abs(ours) for key, v in values.items() if key.startswith(part))
        found.append(Ratio(f"{part}/difference", apart, goal=1e-3))
    raw = {"seconds": seconds, "values": values, "images": name, "count": count, "features": shape}
    return finish(found, raw, options)


if __name__ == "__main__":
    sys.exit(run())
