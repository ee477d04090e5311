import json
import os
import re
import socket
import time
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bessemer.cli import checks
from bessemer.cli.app import app
from bessemer.cli.checks import CHECKS, Finding, pinned_versions


def found(check: str) -> list[Finding]:
    return [finding for each in CHECKS if each.__name__ == check for finding in each()]


def test_the_tested_set_is_read_from_the_repository() -> None:
    pins = pinned_versions()
    assert pins["torch"].startswith("2.")
    assert "+" not in pins["torch"]
    assert pins["numpy"]  # carries a marker


def test_constraints_pin_every_dependency_of_this_environment_once() -> None:
    pins = pinned_versions()
    text = (Path(__file__).resolve().parents[2] / "constraints.txt").read_text()
    names = [line.split("==")[0].lower() for line in text.splitlines() if "==" in line]
    assert len(names) == len(set(names))
    assert "bessemer" not in names
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+( ; python_version >= "3\.11")?', line) for line in lines)
    required = {
        text.replace("[", " ").replace(">", " ").replace("<", " ").split()[0].lower()
        for text in metadata.requires("bessemer") or []
    } - {"bessemer"}
    assert required <= set(pins)


def test_every_package_is_reported_with_its_version() -> None:
    findings = {finding.name: finding for finding in found("_packages")}
    assert findings["torch"].found.startswith(metadata.version("torch"))
    assert findings["ray"].state == "ok"


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ['left-out>=2; extra == "cluster"', "needed[fast]>=1"]
    monkeypatch.setattr(checks.metadata, "requires", lambda name: wanted)
    optional, needed, *_ = found("_packages")
    assert (optional.state, needed.state) == ("warn", "missing")
    assert "bessemer train" in optional.found
    assert needed.fix is not None
    assert needed.fix.endswith('-m pip install "needed[fast]>=1"')


def test_another_version_than_the_tested_one_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "pinned_versions", lambda: {"numpy": "1.0"})
    findings = {finding.name: finding for finding in found("_packages")}
    assert findings["tested set"].state == "warn"
    assert "tested 1.0" in findings["tested set"].found
    assert findings["tested set"].fix == "make install"


def test_a_stale_lock_of_an_extension_build_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(checks.subprocess, "run", lambda *a, **k: checks.subprocess.CompletedProcess(a, 0, "", ""))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert {finding.name for finding in found("_deepspeed")} == {"deepspeed import"}  # a build may be running
    os.utime(lock, (time.time() - 3600,) * 2)
    stale = next(finding for finding in found("_deepspeed") if finding.name == "extensions lock")
    assert stale.state == "warn"
    assert stale.fix == f"rm {lock}"


def test_a_port_in_use_is_found() -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", 5000))
            s.listen()
        except OSError:
            pass  # somebody else holds it, which is as good
        findings = {finding.name: finding for finding in found("_ports")}
    assert findings["port 5000"].state == "warn"
    assert "--port" in (findings["port 5000"].fix or "")


def test_an_unknown_authentication_mode_of_ray_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "tokens")
    assert [finding.state for finding in found("_ray")] == ["warn"]


@pytest.mark.parametrize(("states", "code"), [(["ok", "warn"], 0), (["ok", "missing", "warn"], 1)])
def test_only_what_is_missing_makes_the_doctor_fail(
    states: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = [Finding(f"thing {i}", state, "found", "mend it") for i, state in enumerate(states)]  # type: ignore[arg-type]
    monkeypatch.setattr(checks, "CHECKS", (lambda: iter(findings),))
    text = CliRunner().invoke(app, ["doctor"])
    assert text.exit_code == code
    assert text.output.count("fix: mend it") == len(states)
    as_json = CliRunner().invoke(app, ["doctor", "--json"])
    assert as_json.exit_code == code
    assert json.loads(as_json.output)["ok"] == (code == 0)
    assert [finding["state"] for finding in json.loads(as_json.output)["findings"]] == states


@pytest.mark.slow
def test_doctor_runs_on_this_machine() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.output)
    assert result.exit_code == 0, result.output
    names = {finding["name"] for finding in report["findings"]}
    assert {"python", "torch", "cpu", "disk", "deepspeed import", "extractor efflite0", "extractor inception"} <= names
    assert all(finding["fix"] for finding in report["findings"] if finding["state"] != "ok")
