"""Deployment files: Ray's own schema for the launcher's, and for the others what would otherwise fail on a cluster."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.cli import app

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_the_launcher_accepts_the_cluster(launcher: dict[str, Any]) -> None:
    validate_config(prepare_config(launcher))


def test_the_schema_would_refuse_a_mistake(launcher: dict[str, Any]) -> None:
    from jsonschema import ValidationError

    with pytest.raises(ValidationError):
        validate_config(prepare_config({**launcher, "max_wokers": 3}))


def test_the_head_is_on_demand_without_work_and_workers_are_spot(launcher: dict[str, Any]) -> None:
    kinds = launcher["available_node_types"]
    head = kinds.pop(launcher["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    for kind in kinds.values():
        assert kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert kind["min_workers"] <= kind["max_workers"]
        assert "IamInstanceProfile" in kind["node_config"]
    assert any(kind["resources"].get("GPU") for kind in kinds.values())
    for local in launcher["file_mounts"].values():
        assert local.startswith("~/") or (ROOT / local).is_dir()


def test_clusters_let_nobody_in_without_the_token(launcher: dict[str, Any]) -> None:
    """Whoever reaches an open Ray's ports can run code on it; Ray 2.60 leaves clusters open unless told otherwise."""
    assert any("RAY_AUTH_MODE=token" in option for option in launcher["docker"]["run_options"])
    assert launcher["file_mounts"]["/home/memscan/.ray/auth_token"] == "~/.ray/auth_token"
    (job,) = _documents(CLUSTER / "kuberay" / "scan.yaml")
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "export RAY_AUTH_MODE=token" in (CLUSTER / "slurm" / "scan.sbatch").read_text()


@pytest.mark.parametrize("path", [ROOT / "ray_cluster.yaml", *CLUSTER.rglob("*.*")], ids=lambda path: path.name)
def test_no_file_holds_a_key(path: Path) -> None:
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret_access_key|_TOKEN=|password", path.read_text(), re.IGNORECASE)


def _documents(path: Path) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all(path.read_text())


def _pods(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod specification inside a manifest."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from _pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from _pods(value)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_pods_are_not_root_and_mount_what_they_name(path: Path) -> None:
    pods = [pod for document in _documents(path) for pod in _pods(document)]
    assert pods
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


@pytest.mark.parametrize(
    "path", [path for path in MANIFESTS if "kind: RayJob" in path.read_text()], ids=lambda path: path.name
)
def test_a_ray_job_has_the_installed_ray_and_a_head_without_work(path: Path) -> None:
    import ray

    (job,) = _documents(path)
    cluster = job["spec"]["rayClusterSpec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    limits = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"


def test_every_command_in_the_files_exists() -> None:
    """`memscan ...` lines of manifests, scripts and the runbook, with the options they use."""
    files = [ROOT / "ray_cluster.yaml", *(path for path in CLUSTER.rglob("*") if path.is_file())]
    found = []
    for path in files:
        for line in path.read_text().splitlines():
            match = re.search(r"(?:^|\s|`|\[)memscan ([a-z]+)((?: [^`#&|]*)?)", line)
            if match and (line.startswith("    memscan") or re.search(r"entrypoint:|^RAY_ADDRESS|`memscan|^#  ", line)):
                found.append((path.name, match[1], match[2]))
    assert len(found) >= 5
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for file, name, rest in found:
        assert name in commands, (file, name)
        options = {option for parameter in commands[name].params for option in parameter.opts}
        used = [word for word in shlex.split(rest, comments=True) if word.startswith("--")]
        assert set(used) <= options, (file, name, used)


def test_the_image_is_not_root_and_installs_what_the_package_offers() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1] == "memscan"
    installs = [line for line in lines if "pip install" in line]
    assert "torch==" in installs[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.search(r"\[([a-z0-9,]+)\]", installs[-1])
    assert asked
    assert set(asked[1].split(",")) <= set(extras)
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = [word for word in line.split()[1:] if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), line


def test_the_image_has_one_cuda() -> None:
    """The base, PyTorch's wheels and FAISS: PyTorch from 2.11 is built for CUDA 13, faiss-gpu for CUDA 12."""
    text = (CLUSTER / "Dockerfile").read_text()
    base = re.search(r"^FROM nvidia/cuda:(\d+)\.", text, re.MULTILINE)
    torch = re.search(r"^torch==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert base
    assert torch
    assert (int(torch[1]), int(torch[2])) >= (2, 11)
    assert base[1] == "13"
    assert "[cpu," in text
    assert "driver from 580" in text


def test_the_image_can_fetch_pinned_revisions_and_caches_on_the_scratch_volume() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    environment = dict(re.findall(r"^\s*(?:ENV )?([A-Z_]+)=(\S+)", text, re.MULTILINE))
    assert "HF_HUB_OFFLINE" not in environment
    (volume,) = re.findall(r"^VOLUME (\S+)", text, re.MULTILINE)
    assert environment["MEMSCAN_CACHE"].startswith(f"{volume}/")
    assert environment["HF_HOME"].startswith(f"{volume}/")
    for path in MANIFESTS:
        for container in (one for pod in _pods(list(_documents(path))) for one in pod["containers"]):
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert volume in mounted, (path.name, container["name"])


def test_the_build_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    copied = set()
    for line in (CLUSTER / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            *sources, _ = [word for word in line.split()[1:] if not word.startswith("--")]
            copied |= set(sources)
    assert copied == kept


def test_every_node_has_an_image_that_somebody_chose(launcher: dict[str, Any]) -> None:
    """Where none is given, Ray 2.60 takes one of Ubuntu 18.04, whose driver knows nothing of CUDA 13."""
    images = {kind["node_config"].get("ImageId") for kind in launcher["available_node_types"].values()}
    (image,) = images
    # EC2 looks such a name up in RunInstances; Ray passes it on as it is, unless CloudWatch is configured.
    name = re.fullmatch(
        r"resolve:ssm:(/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-[\w./-]+)", image
    )
    assert name
    assert "cloudwatch" not in launcher["provider"]
    text = (ROOT / "ray_cluster.yaml").read_text()
    assert f"        {name[1]}\n" in text  # how to pin what it stands for
    assert re.search(r"notes of 20\d\d-\d\d-\d\d .*driver (\d+)", text.replace("\n# ", " "))[1] >= "580"


def test_a_stopped_ray_job_is_replaced() -> None:
    text = (CLUSTER / "kuberay" / "scan.yaml").read_text()
    assert "kubectl replace --force" in text
    assert "resumed by applying it again" not in text


def test_the_nightly_job_stands_for_the_newest_checkpoint() -> None:
    (job,) = _documents(CLUSTER / "kuberay" / "nightly.yaml")
    (pod,) = _pods(job)
    assert "--standing" in pod["containers"][0]["command"]


def test_nothing_says_to_install_a_package_that_is_not_published() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = [ROOT / file for file in files if file.endswith((".py", ".md", ".yaml", ".toml", ".html"))]
    found = [
        path.name for path in texts if re.search(r"pip install ['\"]?memscan", path.read_text()) and path.is_file()
    ]
    assert found == []


@pytest.mark.parametrize("path", sorted((CLUSTER / "slurm").iterdir()), ids=lambda path: path.name)
def test_scripts_are_valid_shell(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
