"""`bessemer plan`: tables, JSON, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bessemer.cli.app import run

JOB = Path(__file__).resolve().parents[2] / "jobs" / "biggan-cifar10.yaml"


def plan(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["bessemer", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run()
    return ended.value.code


def test_plan_prints_parts_updates_and_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch, JOB, "--device", "h200", "--efficiency", "0.1") == 0
    printed = capsys.readouterr()
    for said in ("NVIDIA H200", "activations", "139.0 GiB are there", "discriminator", "200 images", "0.1 (assumed)"):
        assert said in printed.out
    assert "datasets/cifar10 is not here" in printed.err


def test_plan_as_json_for_more_workers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--workers", "2", "--set", "training.slice_size=25", "--set", "training.zero_stage=1", "--json"]
    assert plan(monkeypatch, JOB, "--device", "a100", *more) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["workers"], found["zero_stage"], found["device"]) == (2, 1, "NVIDIA A100 80GB")
    assert found["total"] == sum(found["parts"].values())
    assert found["sent"] > 0


def test_plan_refuses_after_printing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wide = ["--set", "training.slice_size=12800", "--set", "training.batch_size=12800"]
    assert plan(monkeypatch, JOB, "--device", "v100", *wide) == 2
    printed = capsys.readouterr()
    assert "total" in printed.out
    assert "error: memory: a worker needs" in printed.err
    assert "Set training.slice_size to" in printed.err


def test_plan_refuses_what_the_rules_refuse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch, JOB, "--workers", "3") == 2
    assert "--set resources.workers=3: resources.workers: 3 does not divide" in capsys.readouterr().err


def test_plan_refuses_what_training_would_refuse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch, JOB, "--set", "training.zero_stage=3") == 2
    assert "training.zero_stage: 3 scatters the weights" in capsys.readouterr().err
