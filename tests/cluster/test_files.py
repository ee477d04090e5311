"""The files of cluster/ agree with the command line, the image, the tested versions and each other."""

from __future__ import annotations

import configparser
import copy
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from bessemer import __version__
from bessemer.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
CLOUDS = sorted((CLUSTER / "cloud").glob("*.yaml"))
SCRIPTS = [CLUSTER / "local/cluster", CLUSTER / "slurm/train.sbatch", CLUSTER / "mlflow/serve.sh"]


def read(path: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLUSTER / path).read_text())
    return found


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def parse(command: str) -> str:
    """Let our command line parse `bessemer VERB ...`, without running it; returns the verb."""
    program, verb, *rest = shlex.split(command)
    assert program == "bessemer"
    group: Any = get_command(app)
    group.commands[verb].make_context(verb, rest)
    return verb


def test_every_directory_explains_itself() -> None:
    directories = sorted(path for path in CLUSTER.iterdir() if path.is_dir())
    assert [path.name for path in directories] == ["cloud", "kubernetes", "local", "mlflow", "netns", "slurm"]
    for directory in directories:
        text = (directory / "README.md").read_text()
        for word in ("Needs:", "It works when", "Stop", "```"):
            assert re.search(word, text, re.IGNORECASE), f"{directory.name}: {word}"
        assert f"]({directory.name}/README.md)" in (CLUSTER / "README.md").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    shell = script.read_text().splitlines()[0].split("/")[-1].split()[-1]
    subprocess.run([shell, "-n", script], check=True)
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, script], check=True)


# Kubernetes


def cluster_specs() -> list[dict[str, Any]]:
    return [read("kubernetes/cluster.yaml")["spec"], read("kubernetes/job.yaml")["spec"]["rayClusterSpec"]]


@pytest.mark.parametrize("spec", cluster_specs(), ids=["cluster", "job"])
def test_kuberay_pods(spec: dict[str, Any]) -> None:
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token", "secretName": "bessemer-token"}
    assert (
        "create secret generic bessemer-token --from-literal=auth_token="
        in (CLUSTER / "kubernetes/README.md").read_text()
    )
    head, *workers = spec["headGroupSpec"], *spec["workerGroupSpecs"]
    assert workers
    images = set()
    for group in (head, *workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        assert "command" not in container, "KubeRay starts Ray itself"
        assert pod["securityContext"]["runAsNonRoot"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
        assert mounted["shared"] == "/shared"
        assert mounted["shm"] == "/dev/shm"
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests["memory"] == limits["memory"], "who takes more than it asked for is killed first"
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
    assert images == {f"registry.example.org/bessemer:{__version__}"}
    ports = {p["name"]: p["containerPort"] for p in head["template"]["spec"]["containers"][0]["ports"]}
    assert ports == {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
    for group in workers:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_a_run_outlives_the_head_of_the_raycluster() -> None:
    """What the head knows lies on a volume, and there is a node beside it for drivers, which always stays."""
    spec = read("kubernetes/cluster.yaml")["spec"]
    assert spec["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    names = {each["name"] for each in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]}
    assert not names & {"RAY_gcs_storage", "RAY_gcs_storage_path"}, "the operator sets them, and refuses ours"
    readme = (CLUSTER / "kubernetes/README.md").read_text()
    assert "GCSFaultToleranceEmbeddedStorage" in readme, "the operator refuses the backend without its gate"
    (group,) = re.findall(r"--driver-on ray.io/node-group=(\w+)", readme)
    (stays,) = (each for each in spec["workerGroupSpecs"] if each["groupName"] == group)
    assert stays["minReplicas"] == 1
    assert stays["rayStartParams"]["num-cpus"] == "0", "workers would run there too"


CRDS = os.environ.get("BESSEMER_KUBERAY_CRDS", "")


@pytest.mark.skipif(not CRDS, reason="BESSEMER_KUBERAY_CRDS names no directory with KubeRay's ray.io_*.yaml")
@pytest.mark.parametrize(("file", "crd"), [("cluster", "ray.io_rayclusters"), ("job", "ray.io_rayjobs")])
def test_kuberay_takes_the_file(file: str, crd: str) -> None:
    """Against `ray-operator/config/crd/bases` of the KubeRay that the README asks for."""
    import jsonschema

    versions = yaml.safe_load((Path(CRDS) / f"{crd}.yaml").read_text())["spec"]["versions"]
    schema = next(each for each in versions if each["name"] == "v1")["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    config = read(f"kubernetes/{file}.yaml")
    jsonschema.validate(config, _strict(schema))
    config["spec"]["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        jsonschema.validate(config, schema)


def _strict(schema: Any) -> Any:
    """Refuse fields that the schema does not have, which Kubernetes would drop without a word."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
    for each in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _strict(each)
    return schema


def test_the_rayjob_calls_our_command_line() -> None:
    spec = read("kubernetes/job.yaml")["spec"]
    assert parse(spec["entrypoint"]) == "train"
    words = spec["entrypoint"].split()
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in head["containers"][0]["volumeMounts"]}
    assert mounts[str(Path(words[2]).parent)] == "job"
    assert words[words.index("--run-dir") + 1].startswith("/shared/")
    assert spec["backoffLimit"] == 0, "a second `train` of the same run directory is refused"
    (config,) = (volume["configMap"]["name"] for volume in head["volumes"] if volume["name"] == "job")
    readme = (CLUSTER / "kubernetes/README.md").read_text()
    assert f"create configmap {config} --from-file={Path(words[2]).name}=" in readme


# Slurm


def test_the_sbatch_script_runs_one_task_per_node_and_our_command_line() -> None:
    text = (CLUSTER / "slurm/train.sbatch").read_text()
    options = set(re.findall(r"^#SBATCH (--\S+)$", text, re.MULTILINE))
    assert {"--ntasks-per-node=1", "--exclusive", "--requeue", "--signal=B:TERM@600"} <= options
    commands = [match.replace('"', "") for match in re.findall(r"command=\((bessemer .*)\)", text)]
    assert [parse(command) for command in commands] == ["resume", "train"]


def test_the_sbatch_script_uses_options_that_symmetric_run_has() -> None:
    from ray.scripts.symmetric_run import symmetric_run

    text = (CLUSTER / "slurm/train.sbatch").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^srun ray symmetric-run (.*?) -- env RAY_ADDRESS=", text, re.MULTILINE)
    words = [word for word in shlex.split(line) if word.startswith("--")]
    known = {option for parameter in symmetric_run.params for option in parameter.opts}
    assert [word for word in words if word not in known] == ["--num-cpus"], "the others are for `ray start`"


# Clouds


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_ray_up_takes_the_file(path: Path) -> None:
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = read(path)
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "max_worker": 1}, schema)
    # As `ray up` does, with the provider's defaults.
    local = config["provider"]["type"] == "local"
    if not local:
        validate_config(fillout_defaults(copy.deepcopy(config)))
        types = config["available_node_types"]
        assert types["gpu"]["max_workers"] == config["max_workers"]
        assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    else:
        assert config["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_cloud_nodes_use_tokens_and_our_image(path: Path) -> None:
    from ray.scripts.scripts import start

    config = read(path)
    assert config["docker"]["image"].endswith(f"/bessemer:{__version__}")
    options = config["docker"]["run_options"]
    assert "-e RAY_AUTH_MODE=token" in options
    (mounted,) = config["file_mounts"]
    assert f"-e RAY_AUTH_TOKEN_PATH={mounted}" in options
    (head,) = (c for c in config["head_start_ray_commands"] if c.startswith("ray start"))
    (worker,) = (c for c in config["worker_start_ray_commands"] if c.startswith("ray start"))
    known = {option for parameter in start.params for option in parameter.opts}
    for command in (head, worker):
        assert {word.partition("=")[0] for word in command.split()[2:]} <= known
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker


# MLflow


def test_the_mlflow_server_is_what_its_command_line_takes() -> None:
    # In a process of its own: the import warns, and warnings are errors here.
    command = [sys.executable, "-m", "mlflow", "server", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    known = set(re.findall(r"--[a-z-]+", done.stdout))
    services = read("mlflow/compose.yaml")["services"]
    server = services["server"]
    used = {word.partition("=")[0]: word.partition("=")[2] for word in server["command"]}
    assert set(used) <= known
    assert used["--app-name"] == "basic-auth"
    assert f"mlflow[auth]=={pinned('mlflow')}" in server["build"]["dockerfile_inline"]
    assert server["ports"] == ["${LISTEN:-127.0.0.1}:5000:5000"]
    assert "ports" not in services["database"], "only the server may reach it"


def test_the_mlflow_server_has_no_password_of_its_own() -> None:
    text = (CLUSTER / "mlflow/compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    assert asked == {"POSTGRES_PASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
    example = dict(re.findall(r"^(\w+)=(.*)$", (CLUSTER / "mlflow/env.example").read_text(), re.MULTILINE))
    assert {name for name, value in example.items() if not value} == asked
    assert set(example) <= set(re.findall(r"\$\{(\w+)", text))
    assert subprocess.run(["git", "check-ignore", "-q", CLUSTER / "mlflow/.env"], cwd=ROOT, check=False).returncode == 0


def test_the_mlflow_server_starts_with_users_in_the_database(tmp_path: Path) -> None:
    """Run serve.sh with an `mlflow` that prints what it is given, and read the file that was written."""
    fake = tmp_path / "mlflow"
    fake.write_text('#!/bin/sh\necho "$MLFLOW_BACKEND_STORE_URI $*"\n')
    fake.chmod(0o755)
    ini = tmp_path / "auth.ini"
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "POSTGRES_PASSWORD": "pw", "MLFLOW_AUTH_CONFIG_PATH": str(ini)}
    done = subprocess.run(
        ["sh", CLUSTER / "mlflow/serve.sh", "--port=5000"], env=env, capture_output=True, text=True, check=True
    )
    database = "postgresql+psycopg2://mlflow:pw@database:5432/mlflow"
    assert done.stdout == f"{database} server --port=5000\n"
    assert stat.S_IMODE(ini.stat().st_mode) == 0o600
    written = configparser.ConfigParser()
    written.read(ini)
    assert written["mlflow"]["database_uri"] == database
    assert written["mlflow"]["auth_cache_ttl_seconds"] == "60"
    package = importlib.util.find_spec("mlflow")
    assert package is not None
    assert package.origin is not None
    example = (Path(package.origin).parent / "server" / "auth" / "basic_auth.ini").read_text()
    assert set(written["mlflow"]) <= set(re.findall(r"^(?:# )?(\w+) =", example, re.MULTILINE))


# The image


def test_the_image_has_what_the_files_use() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "ENTRYPOINT" not in text, "KubeRay and ray up start their own commands"
    (user,) = re.findall(r"useradd .*--uid (\d+) bessemer", text)
    for spec in cluster_specs():
        assert spec["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"] == int(user)
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    for word in copied:
        assert word.startswith("--") or (ROOT / word).exists(), word


# What faults cost


def test_the_table_of_faults_is_that_of_the_newest_result() -> None:
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    with_faults = runpy.run_path(str(ROOT / "scripts" / "document_faults.py"))["with_faults"]
    assert with_faults(page) == page, "renew it with: .venv/bin/python scripts/document_faults.py"
