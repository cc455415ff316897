"""`gpu-tenancy plan`: what the next cycle would do with manifests on a saved cluster, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from click.testing import CliRunner, Result

from gpu_tenancy.__main__ import main
from gpu_tenancy.api import names
from gpu_tenancy.controller.settings import Settings
from tests.unit.controller.facts import CREATED, Object, body

AT: Final = "2026-03-01T12:00:00.000000Z"
MODEL: Final = "A100-SXM4-80GB"
POOL: Final = {"kind": "MiningPool", "namespace": "mining", "name": "idle", "uid": "uid-idle"}


def device(node: str, gpu: int) -> Object:
    """A whole GPU on which the pool mines."""
    return {"device": f"gpu{gpu}-abcdef", "gpu": f"GPU-{node}-{gpu}", "profile": "full", "start": 0, "holder": POOL}


def server(node: str, gpus: int, mined: int, mig: int = 0) -> list[Object]:
    """A node with its GpuNode, its slice and its agent's heartbeat; the last `mig` GPUs are in MIG mode."""
    slots = [device(node, gpu) for gpu in range(mined)]
    known = [
        {"index": gpu, "uuid": f"GPU-{node}-{gpu}", "model": MODEL, "memoryMib": 81920,
         "mode": "MIG" if gpu >= gpus - mig else "Whole"}
        for gpu in range(gpus)
    ]  # fmt: skip
    ready = [{**one, "state": "Ready", "readyAt": AT} for one in slots]
    allocatable = {"cpu": "128", "memory": "1Ti", "pods": "110"}
    return [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node, "uid": f"uid-node-{node}", "resourceVersion": "1"},
            "status": {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": "True"}]},
        },
        body(
            "GpuNode",
            node,
            None,
            spec={"slots": [{**one, "since": AT} for one in slots]},
            status={"gpus": known, "slots": ready},
        ),
        {
            "apiVersion": "resource.k8s.io/v1",
            "kind": "ResourceSlice",
            "metadata": {"name": f"slice-{node}", "uid": f"uid-slice-{node}", "resourceVersion": "1"},
            "spec": {
                "driver": names.DRIVER,
                "nodeName": node,
                "pool": {"name": node, "generation": 1, "resourceSliceCount": 1},
                "devices": [{"name": one["device"]} for one in slots],
            },
        },
        {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "name": f"agent-{node}",
                "namespace": names.SYSTEM_NAMESPACE,
                "uid": f"uid-agent-{node}",
                "resourceVersion": "1",
                "labels": {names.LABEL_AGENT: "true", names.LABEL_NODE: node},
            },
            "spec": {"renewTime": AT, "leaseDurationSeconds": 40, "holderIdentity": node},
        },
    ]


def saved(path: Path, *items: Object) -> Path:
    """A cluster in a file."""
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "takenAt": AT, "items": list(items)}))
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Four mined GPUs on one node, two idle ones and one in MIG mode on another."""
    pool = body("MiningPool", "idle", "mining", spec={"image": "miner"})
    return saved(tmp_path / "cluster.json", *server("n1", 4, mined=4), *server("n2", 3, mined=0, mig=1), pool)


def lease(name: str, **spec: Any) -> Object:  # noqa: ANN401  (handed on)
    metadata = {"name": name, "namespace": "team-a"}
    return {"apiVersion": names.API_VERSION, "kind": "GpuLease", "metadata": metadata, "spec": spec}


def written(path: Path, *documents: object) -> Path:
    path.write_text(yaml.safe_dump_all(documents))
    return path


def planned(*words: object) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, words)])


def shown(*words: object) -> tuple[int, dict[str, Any]]:
    """Exit status, and the JSON."""
    done = planned(*words, "--output", "json")
    return done.exit_code, json.loads(done.stdout)


def test_a_lease_that_fits_says_where_it_goes_who_stops_and_what_that_means(cluster: Path, tmp_path: Path) -> None:
    wanted = lease("train", gpus={"profile": "full", "count": 4})
    status, found = shown(written(tmp_path / "lease.yaml", wanted), "--snapshot", cluster)
    [line] = found["leases"]
    assert (status, line["lease"], line["verdict"]) == (0, "team-a/train", "Placed")
    assert line["places"] == [f"n1 GPU {gpu}" for gpu in range(4)]
    assert len(line["stops"]) == 4
    assert line["message"].startswith("4 miners stop for it; 1 node had 4 GPUs of A100-SXM4-80GB free of leases")
    assert {"Admit", "SetSlots", "StopMiner"} - {one["action"] for one in found["actions"]} <= {"StopMiner"}


def test_a_slice_says_which_slices_it_takes_and_what_it_leaves(cluster: Path, tmp_path: Path) -> None:
    status, found = shown(
        written(tmp_path / "l.yaml", lease("one", gpus={"profile": "1g.10gb"})), "--snapshot", cluster
    )
    assert (status, found["leases"][0]["places"]) == (0, ["n2 GPU 2 slice 6"])
    assert "It leaves 7 of 8 slices on n2 GPU 2 free of leases." in found["leases"][0]["message"]


def test_one_that_has_to_wait_says_why_in_numbers_and_the_status_is_3(cluster: Path, tmp_path: Path) -> None:
    wanted = [lease("a", gpus={"profile": "full", "count": 4}), lease("b", gpus={"profile": "full", "count": 4})]
    status, found = shown(written(tmp_path / "leases.yaml", *wanted), "--snapshot", cluster)
    assert status == 3
    assert [line["verdict"] for line in found["leases"]] == ["Placed", "Waits"]
    assert "needs 4 free GPUs" in found["leases"][1]["message"]


def test_one_that_can_never_be_placed_is_refused(cluster: Path, tmp_path: Path) -> None:
    wanted = lease("huge", gpus={"profile": "full", "count": 16})
    status, found = shown(written(tmp_path / "lease.yaml", wanted), "--snapshot", cluster)
    assert (status, found["leases"][0]["verdict"]) == (3, "Refused")


def test_a_tenant_of_the_manifests_counts(cluster: Path, tmp_path: Path) -> None:
    tenant = {
        "apiVersion": names.API_VERSION,
        "kind": "GpuTenant",
        "metadata": {"name": "acme"},
        "spec": {"namespaces": ["team-a"], "quota": {"gpus": 1}},
    }
    files = written(tmp_path / "all.yaml", tenant, lease("two", gpus={"profile": "full", "count": 2}))
    status, found = shown(files, "--snapshot", cluster)
    assert status == 3
    assert found["leases"][0]["message"].startswith("Tenant acme may hold 1 GPU at a time; this lease needs 2.")


def test_the_table_is_for_people(cluster: Path, tmp_path: Path) -> None:
    done = planned(written(tmp_path / "l.yaml", lease("train", gpus={"profile": "full"})), "--snapshot", cluster)
    assert done.exit_code == 0
    for words in ("Leases in the next cycle, 2026-03-01T12:00:00Z", "team-a/train", "Placed", "n2 GPU 1", "SetSlots"):
        assert words in done.stdout


def test_what_was_saved_is_planned_alike(cluster: Path, tmp_path: Path) -> None:
    manifest = written(tmp_path / "lease.yaml", lease("train", gpus={"profile": "full", "count": 4}))
    first = shown(manifest, "--snapshot", cluster, "--save", tmp_path / "again.json")
    assert shown(manifest, "--snapshot", tmp_path / "again.json") == first


def test_a_list_that_kubectl_printed_will_do(cluster: Path, tmp_path: Path) -> None:
    content = json.loads(cluster.read_text())
    del content["takenAt"]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(content))
    manifest = written(tmp_path / "lease.yaml", lease("train", gpus={"profile": "full"}))
    assert shown(manifest, "--snapshot", tmp_path / "list.yaml")[0] == 0


def test_without_manifests_it_is_the_next_cycle_as_things_are(tmp_path: Path) -> None:
    waiting = body("GpuLease", "late", spec={"gpus": {"profile": "full"}})
    path = saved(tmp_path / "cluster.json", *server("n1", 1, mined=0), waiting)
    status, found = shown("--snapshot", path)
    assert (status, [line["lease"] for line in found["leases"]]) == (0, ["team-a/late"])


def test_an_edited_lease_is_the_same_lease(tmp_path: Path) -> None:
    existing = body("GpuLease", "train", spec={"gpus": {"profile": "full"}, "suspend": True})
    path = saved(tmp_path / "cluster.json", *server("n1", 1, mined=0), existing)
    assert shown("--snapshot", path)[1]["leases"][0]["verdict"] != "Placed"
    resumed = written(tmp_path / "lease.yaml", lease("train", gpus={"profile": "full"}))
    status, found = shown(resumed, "--snapshot", path)
    assert (status, [line["verdict"] for line in found["leases"]]) == (0, ["Placed"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is not YAML"),
        ("kind: Pod\napiVersion: v1", "document 1 is a Pod of v1; plan understands GpuLease, MiningPool"),
        ("- 1", "document 1 is no object; plan understands"),
        (
            f"---\nkind: GpuLease\napiVersion: {names.API_VERSION}\nmetadata: {{}}",
            "document 1: metadata.name is missing",
        ),
        (
            f"""
apiVersion: {names.API_VERSION}
kind: GpuLease
metadata: {{name: a}}
spec: {{gpus: {{profile: full}}}}
---
apiVersion: {names.API_VERSION}
kind: GpuLease
metadata: {{name: b}}
spec: {{gpus: {{count: 1}}}}
""",
            "document 2 (GpuLease b), spec.gpus.profile: Field required",
        ),
    ],
    ids=["no-yaml", "another-kind", "no-object", "no-name", "a-field"],
)
def test_bad_manifests_are_named_with_file_document_and_field(
    text: str, sentence: str, cluster: Path, tmp_path: Path
) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    done = planned(tmp_path / "odd.yaml", "--snapshot", cluster)
    assert done.exit_code == 2
    assert str(tmp_path / "odd.yaml") in done.stderr
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is neither JSON nor YAML"),
        ("{}", "has no list `items`"),
        ('{"items": [1]}', "items[0] is no Kubernetes object"),
        ('{"items": [{"apiVersion": "v1", "kind": "Pod", "metadata": null}]}', "items[0].metadata needs name, uid"),
        ('{"items": [], "takenAt": "noon"}', 'takenAt: "noon" is no time'),
    ],
)
def test_a_bad_snapshot_is_named(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(text)
    done = planned("--snapshot", tmp_path / "odd.json")
    assert done.exit_code == 2
    assert sentence in done.stderr


def test_a_cluster_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    done = planned("--kubeconfig", tmp_path / "missing")
    assert done.exit_code == 2
    assert "missing" in done.stderr


def test_the_settings_are_the_operators() -> None:
    assert "default_quota_gpus" in Settings.model_fields
    assert CREATED < AT
