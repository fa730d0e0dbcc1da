"""docker/kubernetes.yaml against its schema and within itself, and its pods' commands run on this machine."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import REPOSITORY

MANIFEST = REPOSITORY / "docker" / "kubernetes.yaml"


def documents() -> dict[str, dict[str, Any]]:
    """The manifest's documents by kind and name."""
    loaded = yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))
    return {f"{document['kind']} {document['metadata']['name']}": document for document in loaded}


def same_after_its_schema(document: dict[str, Any]) -> bool:
    """Whether the models of Kubeflow Trainer's API keep all of a document; a wrong type raises ValueError."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    kinds = {
        "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
        "TrainJob": models.TrainerV1alpha1TrainJob,
    }
    return kinds[document["kind"]].from_dict(document).to_dict() == document


def pod() -> dict[str, Any]:
    (job,) = documents()["TrainingRuntime fastnet"]["spec"]["template"]["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", list(documents()))
def test_the_manifest_fits_its_schema(name: str) -> None:
    assert same_after_its_schema(documents()[name])


POD = "spec template spec replicatedJobs 0 template spec template spec"


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("TrainingRuntime fastnet", f"{POD} terminationGracePeriod", 150),
        ("TrainingRuntime fastnet", f"{POD} securityContext capabilities", {"drop": ["ALL"]}),
        ("TrainingRuntime fastnet", f"{POD} securityContext runAsNonRoot", "yes"),
        ("TrainingRuntime fastnet", f"{POD} containers 0 securityContext runAsUser", "1000"),
        ("TrainingRuntime fastnet", f"{POD} containers 0 volumeMounts 0 mountPath", None),
        ("TrainingRuntime fastnet", f"{POD} containers 0 command", "torchrun"),
        ("TrainingRuntime fastnet", f"{POD} volumes 2 emptyDir sizelimit", "1Gi"),
        ("TrainingRuntime fastnet", "spec template spec failurePolicy maxRestarts", "10"),
        ("TrainingRuntime fastnet", "spec mlPolicy torch elasticPolicy", {"maxRestarts": 3}),
        ("TrainJob fastnet-lstm", "spec trainer numNodes", "2"),
        ("TrainJob fastnet-lstm", "spec trainer gpus", 8),
        ("TrainJob fastnet-lstm", "spec runtimeRef name", None),
        ("PersistentVolumeClaim fastnet-runs", "spec accessModes", "ReadWriteMany"),
    ],
)
def test_a_mistake_in_the_manifest_does_not_fit(name: str, place: str, value: Any) -> None:
    """`value` put at `place`, or what is there removed (None)."""
    document = copy.deepcopy(documents()[name])
    *path, last = (int(word) if word.isdigit() else word for word in place.split())
    inner: Any = document
    for step in path:
        inner = inner[step]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    try:
        fits = same_after_its_schema(document)
    except ValueError:
        fits = False
    assert not fits


def test_the_manifest_refers_to_what_it_has() -> None:
    known, volumes = documents(), {volume["name"]: volume for volume in pod()["volumes"]}
    assert f"TrainingRuntime {known['TrainJob fastnet-lstm']['spec']['runtimeRef']['name']}" in known
    (container,) = pod()["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claimed = [
        volume["persistentVolumeClaim"] for volume in volumes.values() if "persistentVolumeClaim" in volume
    ]
    assert {f"PersistentVolumeClaim {claim['claimName']}" for claim in claimed} == {
        name for name in known if "Claim" in name
    }


def test_a_pod_can_do_no_more_than_train() -> None:
    (container,) = pod()["containers"]
    assert pod()["securityContext"]["runAsNonRoot"] and pod()["securityContext"]["runAsUser"] > 0
    assert pod()["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/data"]["readOnly"] and not mounts["/runs"].get("readOnly")
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert volumes[mounts["/data"]["name"]]["persistentVolumeClaim"]["readOnly"]
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"


def test_a_pod_outlives_the_saving_of_its_ranks() -> None:
    patience = re.search(r"--shutdown-timeout=(\d+)", pod()["containers"][0]["command"][2])
    assert patience and pod()["terminationGracePeriodSeconds"] > int(patience[1])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_the_pods_of_the_manifest_train(tiny_set: Path, tmp_path: Path) -> None:
    """Two pods' commands with the variables that the operator gives them, as two processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spec = documents()["TrainJob fastnet-lstm"]["spec"]["trainer"]
    smaller = "--image-size 32 --batch-size 8 --weights none --max-steps 1 --threads 1 --json"
    words = [
        *pod()["containers"][0]["command"],
        *spec["args"],
        "--run-dir",
        str(tmp_path / "run"),
        *smaller.split(),
    ]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}",
        "FASTNET_DATA": str(tiny_set),
        "OMP_NUM_THREADS": "1",
        "PET_NNODES": str(spec["numNodes"]),
        "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port),
    }
    pods = [
        subprocess.Popen(
            words,
            env={**environment, "PET_NODE_RANK": str(rank)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(spec["numNodes"])
    ]
    said = [process.communicate()[0] for process in pods]
    assert [process.returncode for process in pods] == [0, 0]
    assert json.loads("".join(said).splitlines()[-1])["step"] == 1
    sessions = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))["sessions"]
    assert [session["ranks"] for session in sessions] == [2]
