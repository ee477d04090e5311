from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bessemer.errors import EvaluationError
from bessemer.evaluation.cleanfid_import import import_cleanfid
from bessemer.evaluation.evaluate import compare_images, evaluate_system, sampled_counts
from bessemer.evaluation.extractors import get_extractor
from bessemer.evaluation.images import open_images
from bessemer.evaluation.metrics import frechet_distance, frechet_distance_infinity, kernel_distance
from bessemer.evaluation.neighbours import density_coverage, nearest, precision_recall, suspicious
from bessemer.evaluation.pairs import draw_one, pair_figure
from bessemer.evaluation.sampling import allocate_labels, draw_chunk, prepare, sampling_mode, to_uint8
from bessemer.evaluation.score import inception_score


def drawn(system, info, samples: int, seed: int) -> torch.Tensor:
    labels = allocate_labels(info.class_counts, samples)
    prepare(system, info.class_counts, seed=seed, truncation=None, device="cpu")
    with sampling_mode(system):
        chunks = [
            draw_chunk(system, labels, c, seed=seed, truncation=None, device="cpu") for c in range(-(-samples // 32))
        ]
    return to_uint8(torch.cat(chunks))


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_fid_equals_clean_fid_on_the_same_images_in_files(
    standin: Path, toy, info, memory_data, tmp_path: Path
) -> None:
    system, data = toy(), memory_data(90)
    [record] = evaluate_system(system, info(), data, ["fid"], samples=80, seed=3)
    real = data.images[np.sort(np.random.default_rng(0).permutation(90)[:80])]
    for folder, images in (("fake", drawn(toy(), info(), 80, 3).numpy()), ("real", real)):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / folder / f"{i:03d}.png")
    cleanfid = import_cleanfid("fid")
    wrapper = import_cleanfid("inception_torchscript").InceptionV3W(str(standin.parent), download=False)
    expected = cleanfid.compute_fid(
        str(tmp_path / "fake"),
        str(tmp_path / "real"),
        custom_feat_extractor=lambda x: wrapper(x)[:, :32],  # the rest is zero, and takes scipy long
        num_workers=0,
        device=torch.device("cpu"),
        use_dataparallel=False,
        verbose=False,
    )
    assert expected > 0.01
    assert record.value == pytest.approx(expected, rel=1e-3)


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("mode", "metric"), [("clean", "fid"), ("legacy_tensorflow", "fd_inception-tensorflow")])
def test_folders_have_clean_fids_distance_in_its_modes(
    standin: Path, memory_data, tmp_path: Path, mode: str, metric: str
) -> None:
    for folder, count in (("fake", 40), ("real", 50)):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(memory_data(count, size=24).images):
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / folder / f"{i:03d}.png")
    wrapper = import_cleanfid("inception_torchscript").InceptionV3W(
        str(standin.parent), download=False, resize_inside=mode == "legacy_tensorflow"
    )
    expected = import_cleanfid("fid").compute_fid(
        str(tmp_path / "fake"),
        str(tmp_path / "real"),
        mode=mode,
        custom_feat_extractor=lambda x: wrapper(x)[:, :32],
        num_workers=0,
        device=torch.device("cpu"),
        use_dataparallel=False,
        verbose=False,
    )
    with open_images(tmp_path / "fake") as fake, open_images(tmp_path / "real") as real:
        [record] = compare_images(fake, real, [metric])
    assert expected > 0.01
    assert record.value == pytest.approx(expected, rel=1e-3)
    assert (record.samples, record.reference_samples) == (40, 50)


def test_values_are_those_of_the_metrics_on_the_documented_images(standin: Path, toy, info, memory_data) -> None:
    system, data = toy(), memory_data(60)
    records = evaluate_system(system, info(), data, ["kid_inception", "fid"], samples=70, seed=1)
    extractor = get_extractor("inception")
    fake = extractor.features(drawn(toy(), info(), 70, 1)).numpy()
    real = extractor.features(torch.from_numpy(data.images)).numpy()
    estimate = kernel_distance(fake, real)
    assert [r.metric for r in records] == ["kid_inception", "fid"]
    assert records[0].value == pytest.approx(estimate.value, rel=1e-5)
    assert records[0].standard_error == pytest.approx(estimate.standard_error, rel=1e-5)
    assert records[1].value == pytest.approx(frechet_distance(fake, real), rel=1e-5)


def test_every_kind_is_that_of_its_function_on_the_documented_images(standin: Path, toy, info, memory_data) -> None:
    system, data = toy(), memory_data(90)
    names = ["precision", "recall", "density", "coverage", "fdinf", "intrafd", "is", "memorised"]
    records = evaluate_system(system, info(), data, [f"{name}_inception" for name in names], samples=70, seed=1)
    found = {r.metric.removesuffix("_inception"): r for r in records}
    assert list(found) == names
    extractor = get_extractor("inception")
    fake = extractor.features(drawn(toy(), info(), 70, 1)).numpy()
    everything = extractor.features(torch.from_numpy(data.images)).numpy()
    choice = np.sort(np.random.default_rng(0).permutation(90)[:70])
    real = everything[choice]
    assert (found["precision"].value, found["recall"].value) == astuple(precision_recall(fake, real))
    assert (found["density"].value, found["coverage"].value) == astuple(density_coverage(fake, real))
    infinite = frechet_distance_infinity(fake, real)
    assert found["fdinf"].value == pytest.approx(infinite.value, rel=1e-5)
    assert found["fdinf"].standard_error == pytest.approx(infinite.standard_error, rel=1e-5)
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        weight = dict(torch.jit.load(standin).named_parameters())["output.weight"]
    p = torch.softmax(torch.from_numpy(fake).double() @ weight.detach().double().T, 1).numpy()
    assert found["is"].value == pytest.approx(inception_score(p).value, rel=1e-6)
    assert found["is"].value > 1
    labels = allocate_labels(info().class_counts, 70)
    by_class = [frechet_distance(fake[labels == c], real[choice % 3 == c]) for c in range(3)]
    assert found["intrafd"].value == pytest.approx(np.mean(by_class), rel=1e-5)
    assert list(found["intrafd"].details["classes"].values()) == pytest.approx(by_class, rel=1e-5)
    near = nearest(fake, everything)  # copies are looked for among all real images
    assert found["memorised"].reference_samples == 90
    assert found["memorised"].value == suspicious(near).mean()
    first = found["memorised"].details["pairs"][0]
    assert first["ratio"] == pytest.approx(near.ratio.min())
    assert first["real"] == near.ids[first["image"]]
    assert {name for name, r in found.items() if r.higher_is_better} == {*names[:4], "is"}


def test_many_images_are_summed_instead_of_gathered(standin: Path, toy, info, memory_data, workers, tmp_path) -> None:
    # Colour means as features: few dimensions, so that a Frechet distance needs sums alone.
    def work(rank: int, group):
        def refuse(value):
            assert not isinstance(value, np.ndarray) or len(value) <= 120, "features were gathered"
            return gather(value)

        gather, group.gather = group.gather, refuse
        return evaluate_system(
            toy(), info(), memory_data(120), ["fd_efflite0"], samples=300, group=group, cache_dir=tmp_path / "c"
        )

    class Means:
        name, dimension, weights_sha256, preprocessing, head = "efflite0", 9, "0", "means", None

        def features(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(images.float(), (1, 3)).flatten(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bessemer.evaluation.evaluate.get_extractor", lambda name, device: Means())
        values = [workers(world, work)[0][0].value for world in (1, 2, 3)]
    fake = Means().features(drawn(toy(), info(), 300, 0)).numpy()
    real = Means().features(torch.from_numpy(memory_data(120).images)).numpy()
    assert values == pytest.approx([frechet_distance(fake, real)] * 3, rel=1e-9)


def test_balance_is_as_asked(standin: Path, toy, info, memory_data) -> None:
    def of(balance: str):
        return evaluate_system(
            toy(),
            info(),
            memory_data(40),
            ["kid_inception"],
            samples=60,
            balance=balance,  # type: ignore[arg-type]
        )[0]

    assert of("data").balance == "data"
    assert of("uniform").value != of("data").value
    counts = sampled_counts(info().class_counts, "uniform")
    assert np.bincount(allocate_labels(counts, 60)).tolist() == [20, 20, 20]
    equal = info(class_counts=[1, 1, 1])
    [record] = evaluate_system(toy(), equal, memory_data(40), ["kid_inception"], samples=60)
    assert record.value == of("uniform").value


def test_sets_are_compared_as_systems_are(standin: Path, memory_data, workers, tmp_path: Path) -> None:
    real = memory_data(90)
    noisy = memory_data(70)
    noisy.images = (noisy.images * 0.7).astype(np.uint8)
    noisy.manifest.hash = "noisy"
    metrics = ["fid", "kid_inception", "recall_inception", "memorised_inception"]

    def work(rank: int, group):
        return compare_images(noisy, real, metrics, samples=60, batch_size=32, group=group, cache_dir=tmp_path / "c")

    first = compare_images(noisy, real, metrics, samples=60, batch_size=32, cache_dir=tmp_path / "other")
    extractor = get_extractor("inception")
    x = extractor.features(torch.from_numpy(noisy.images[np.sort(np.random.default_rng(0).permutation(70)[:60])]))
    y = extractor.features(torch.from_numpy(real.images))
    assert first[0].value == pytest.approx(frechet_distance(x.numpy(), y.numpy()), rel=1e-6)
    assert [(r.samples, r.reference_samples, r.seed, r.weights, r.weights_sha256) for r in first] == [
        (60, 90, None, "images", "noisy")
    ] * 4
    shared = workers(3, work)
    assert [replace(r, seconds=0.0) for r in shared[0]] == [replace(r, seconds=0.0) for r in first]
    assert shared[1:] == [[], []]
    reads = real.reads + noisy.reads
    compare_images(noisy, real, metrics, samples=60, cache_dir=tmp_path / "other")
    assert real.reads + noisy.reads == reads  # features of both sets were kept
    [fewer] = compare_images(noisy, real, ["memorised_inception"], samples=60, real=50, cache_dir=tmp_path / "c")
    assert fewer.reference_samples == 50


def test_a_copied_training_set_is_memorised(memory_data) -> None:
    real, fresh = memory_data(80), memory_data(60)
    fresh.manifest.hash = "fresh"
    fresh.images[10:40] = real.images[30:60]
    [record] = compare_images(fresh, real, ["memorised_pixels"])
    assert record.value >= 0.5
    shown = {pair["image"]: pair["real"] for pair in record.details["pairs"]}
    assert len(shown) == 16
    assert all(real_id == image + 20 for image, real_id in shown.items())


def test_an_image_of_an_evaluation_is_drawn_again_by_its_number(toy, info) -> None:
    images = drawn(toy(), info(), 80, 3)
    read = draw_one(toy(), info(), 80, seed=3, truncation=None, balance="data", device="cpu")
    for number in (0, 31, 32, 79):
        assert torch.equal(torch.from_numpy(read(number)), images[number])
    figure = pair_figure([{"image": 1, "real": 0}] * 5, lambda i: images[i].numpy(), lambda i: images[i][:1].numpy())
    assert figure.shape == (2 * 16, 8 * 16, 3)
    np.testing.assert_array_equal(figure[:16, :16], images[1].permute(1, 2, 0).numpy())


def test_record_carries_the_protocol(standin: Path, toy, info, memory_data) -> None:
    [record] = evaluate_system(toy(), info(), memory_data(60), ["kid_inception"], samples=70, seed=1, truncation=0.5)
    extractor = get_extractor("inception")
    assert (record.samples, record.reference_samples, record.seed, record.truncation) == (70, 60, 1, 0.5)
    assert (record.extractor, record.extractor_sha256) == ("inception", extractor.weights_sha256)
    assert record.preprocessing == extractor.preprocessing
    assert len(record.reference_hash) == 64
    assert record.weights == "ema half_life_kimg=10.0 rampup=0.05"
    assert record.weights_sha256 == "5a"
    assert (record.estimator, record.balance) == ("unbiased, 100 subsets of 1000", "data")
    assert record.seconds > 0
    assert record.as_dict()["metric"] == "kid_inception"


@pytest.mark.parametrize(("samples", "batch_size"), [(150, 32), (150, 70), (40, 10), (20, 50)])
def test_any_number_of_workers_computes_the_same(
    standin: Path, toy, info, memory_data, workers, tmp_path: Path, samples: int, batch_size: int
) -> None:
    found = []
    for world in (1, 2, 3):
        data = [memory_data(120) for _ in range(world)]

        def work(rank: int, group, world: int = world, data=data):
            return evaluate_system(
                toy(),
                info(),
                data[rank],
                ["fid", "kid_inception"],
                samples=samples,
                batch_size=batch_size,
                group=group,
                cache_dir=tmp_path / f"cache{world}-{rank}",  # workers may be on different machines
            )

        first, *others = workers(world, work)
        assert others == [[]] * (world - 1)
        assert sum(d.reads for d in data) == min(samples, 120)
        found.append([replace(r, seconds=0.0) for r in first])
    assert found[0] == found[1] == found[2]


def test_two_workers_with_efflite0_compute_the_same(toy, info, memory_data, workers, tmp_path: Path) -> None:
    def work(world: int):
        return lambda rank, group: evaluate_system(
            toy(channels=1),
            info(),
            memory_data(40, channels=1),
            ["kid_efflite0", "fd_efflite0"],
            samples=64,
            batch_size=32,
            group=group,
            cache_dir=tmp_path / str(world),
        )

    one, two = workers(1, work(1))[0], workers(2, work(2))[0]
    assert [r.metric for r in one] == ["kid_efflite0", "fd_efflite0"]
    for a, b in zip(one, two, strict=True):
        assert b.value == pytest.approx(a.value, rel=1e-9)


def test_reference_is_read_once_and_gives_the_same_values(
    standin: Path, toy, info, memory_data, tmp_path: Path
) -> None:
    data = memory_data(60)

    def values() -> list[float]:
        records = evaluate_system(
            toy(), info(), data, ["fid", "kid_inception"], samples=40, cache_dir=tmp_path / "features"
        )
        return [r.value for r in records]

    first = values()
    assert data.reads == 40
    assert values() == first
    assert data.reads == 40
    [kept] = (tmp_path / "features").iterdir()
    kept.write_bytes(kept.read_bytes()[:-200])  # torn, as by a full disk
    assert values() == first
    assert data.reads == 80
    assert values() == first
    assert data.reads == 80


def test_a_worker_without_the_reference_makes_all_of_them_compute_it(
    standin: Path, toy, info, memory_data, workers, tmp_path: Path
) -> None:
    data = [memory_data(64) for _ in range(2)]

    def work(rank: int, group):
        return evaluate_system(
            toy(),
            info(),
            data[rank],
            ["fid"],
            samples=64,
            batch_size=32,
            group=group,
            cache_dir=tmp_path / f"machine{rank}",
        )

    first = workers(2, work)[0][0].value
    for file in (tmp_path / "machine1").iterdir():
        file.unlink()
    assert workers(2, work)[0][0].value == first
    assert [d.reads for d in data] == [64, 64]
    assert len(list((tmp_path / "machine1").iterdir())) == 1


def test_unwritable_cache_costs_time_only(standin: Path, toy, info, memory_data, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").touch()
    records = evaluate_system(toy(), info(), memory_data(40), ["fid"], samples=40, cache_dir=tmp_path / "file")
    assert np.isfinite(records[0].value)
    assert "cannot be written" in caplog.text


def test_evaluation_leaves_modes_and_running_statistics_alone(standin: Path, toy, info, memory_data) -> None:
    system = toy()
    system.painter.train()
    before = system.painter.norm.running_mean.clone()
    evaluate_system(system, info(), memory_data(40), ["fid"], samples=40)
    assert all(m.training for m in system.painter.modules())
    assert torch.equal(system.painter.norm.running_mean, before)
    assert all(p.grad is None and p.requires_grad for p in system.painter.parameters())


def test_truncation_and_seed_change_the_samples(standin: Path, toy, info, memory_data) -> None:
    data = memory_data(40)

    def value(**options) -> float:
        return evaluate_system(toy(), info(), data, ["fid"], samples=40, **options)[0].value

    assert len({value(), value(seed=1), value(truncation=0.3), value()}) == 3


def test_progress_counts_this_workers_images(standin: Path, toy, info, memory_data) -> None:
    calls = []
    evaluate_system(
        toy(), info(), memory_data(50), ["fid"], samples=70, batch_size=32, progress=lambda *call: calls.append(call)
    )
    assert calls == [
        *[("real images, inception", done, 50) for done in (32, 50)],
        *[("generated images", done, 70) for done in (32, 64, 70)],
    ]


def test_images_that_are_not_finite_stop_every_worker(standin: Path, toy, info, memory_data, workers) -> None:
    def work(rank: int, group):
        system = toy()
        with torch.no_grad():
            system.painter.colour[3:6] = float("nan")  # class 1: 60 %
        with pytest.raises(EvaluationError, match="generated images: 39 of 64 hold NaN or infinity") as raised:
            evaluate_system(system, info(), memory_data(64), ["fid"], samples=64, group=group)
        return str(raised.value)

    first, second = workers(2, work)
    bad = np.flatnonzero(allocate_labels(info().class_counts, 64) == 1)[:8]
    assert f"(number {', '.join(map(str, bad))}, ...). The weights of painter are not finite" in first
    assert first == second


def test_what_cannot_be_evaluated_is_refused(toy, info, memory_data) -> None:
    data = memory_data(40)
    assert evaluate_system(toy(), info(), data, [], samples=40) == []
    with pytest.raises(EvaluationError, match="Did you mean 'kid_efflite0'"):
        evaluate_system(toy(), info(), data, ["kid_efflite"], samples=40)
    with pytest.raises(EvaluationError, match="samples: 1 generated and 40 real images"):
        evaluate_system(toy(), info(), data, ["fid"], samples=1)
    assert data.reads == 0
