"""What the operator makes: who owns it, where it may run, and that nothing secret gets into it."""

from __future__ import annotations

import copy
import json

from gpu_tenancy.api import names
from gpu_tenancy.controller import manifests
from gpu_tenancy.core.snapshot import Key
from tests.unit.controller.facts import CONTAINERS, Object, admitted, pool, record, record_spec, slot

CLAIM_UID = "5f2c1d9e-0000-4000-8000-000000000001"
NODE_TERMS = ("spec", "template", "spec", "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution")


def _at(manifest: Object, *path: str) -> Object:
    found = manifest
    for name in path:
        found = found[name]
    return found


def _terms(job: Object) -> list[Object]:
    terms: list[Object] = _at(job, *NODE_TERMS)["nodeSelectorTerms"]
    return terms


def _on(node: str) -> list[Object]:
    return [{"key": "metadata.name", "operator": "In", "values": [node]}]


def test_a_claim_template_bears_the_name_of_its_lease_and_goes_with_it() -> None:
    made = manifests.claim_template(admitted())
    assert (made["metadata"]["namespace"], made["metadata"]["name"]) == ("team-a", "train")
    [owner] = made["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("GpuLease", "uid-train", True)
    assert "blockOwnerDeletion" not in owner


def test_claims_made_from_a_template_can_be_found_and_ask_for_devices_of_that_lease_only() -> None:
    made = manifests.claim_template(admitted(gpus={"profile": "full", "count": 4}))
    claim = made["spec"]
    assert claim["metadata"]["labels"][names.LABEL_HOLDER] == "uid-train"
    [request] = claim["spec"]["devices"]["requests"]
    exactly = request["exactly"]
    assert (exactly["deviceClassName"], exactly["count"]) == (names.DEVICE_CLASS, 4)
    [selector] = exactly["selectors"]
    assert '.holder == "uid-train"' in selector["cel"]["expression"]
    [config] = claim["spec"]["devices"]["config"]
    assert config["requests"] == [request["name"]]
    assert config["opaque"]["driver"] == names.DRIVER
    assert config["opaque"]["parameters"]["holder"] == "uid-train"


def test_a_selector_asks_whether_a_device_has_a_holder_before_it_compares() -> None:
    """A missing attribute is a CEL error, which would abort the allocation of every claim."""
    [request] = manifests.claim_template(admitted())["spec"]["spec"]["devices"]["requests"]
    expression = request["exactly"]["selectors"][0]["cel"]["expression"]
    driver, guard, comparison = expression.split(" && ")
    assert driver == f'device.driver == "{names.DRIVER}"'
    assert guard == f'"holder" in device.attributes["{names.DRIVER}"]'
    assert comparison.endswith('.holder == "uid-train"')


def test_a_job_runs_one_pod_per_member_of_the_gang_and_never_a_second_try() -> None:
    made = manifests.job(admitted(pods=3, template=CONTAINERS), 2, ("n1", "n2"))
    assert made["metadata"]["name"] == "train-2"
    assert made["metadata"]["labels"][names.LABEL_ATTEMPT] == "2"
    spec = made["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (
        "Indexed",
        3,
        3,
        0,
    )
    assert spec["template"]["metadata"]["labels"][names.LABEL_HOLDER] == "uid-train"


def test_every_container_of_a_job_gets_the_devices_and_the_pod_tolerates_gpu_taints() -> None:
    template = {"spec": {"containers": [{"name": "a", "image": "x"}, {"name": "b", "image": "y"}]}}
    pod = manifests.job(admitted(template=template), 1, ("n1",))["spec"]["template"]["spec"]
    assert pod["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": "train"}]
    assert [one["resources"]["claims"] for one in pod["containers"]] == [[{"name": "gpu"}]] * 2
    assert {"key": "nvidia.com/gpu", "operator": "Exists"} in pod["tolerations"]


def test_the_pods_of_a_job_are_held_to_the_planned_nodes() -> None:
    made = manifests.job(admitted(template=CONTAINERS), 1, ("n1", "n2"))
    assert _terms(made) == [{"matchFields": _on("n1")}, {"matchFields": _on("n2")}]


def test_a_tenants_own_affinity_holds_beside_the_planned_nodes() -> None:
    """Terms are alternatives: each of the tenant's must be met together with one of the nodes."""
    fast = {"matchExpressions": [{"key": "disk", "operator": "In", "values": ["nvme"]}]}
    named = {"matchFields": _on("n1")}
    affinity = {"nodeAffinity": {NODE_TERMS[-1]: {"nodeSelectorTerms": [fast, named]}}}
    template = {"spec": {**CONTAINERS["spec"], "affinity": affinity}}
    assert _terms(manifests.job(admitted(template=template), 1, ("n1", "n2"))) == [
        {**fast, "matchFields": _on("n1")},
        {"matchFields": [*_on("n1"), *_on("n1")]},
        {**fast, "matchFields": _on("n2")},
        {"matchFields": [*_on("n1"), *_on("n2")]},
    ]


def test_a_tenants_other_wishes_of_affinity_are_left_as_they_are() -> None:
    apart: Object = {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}
    template = {"spec": {**CONTAINERS["spec"], "affinity": apart}}
    pod = manifests.job(admitted(template=template), 1, ("n1",))["spec"]["template"]["spec"]
    assert pod["affinity"]["podAntiAffinity"] == apart["podAntiAffinity"]


def test_a_null_in_a_template_says_the_same_as_nothing() -> None:
    """Helm leaves such keys behind."""
    odd = {"tolerations": None, "affinity": {"nodeAffinity": None}, "nodeSelector": None}
    with_nulls = {"metadata": None, "spec": {**CONTAINERS["spec"], **odd}}
    made = [manifests.job(admitted(template=one), 1, ("n1",)) for one in (with_nulls, CONTAINERS)]
    assert made[0] == made[1]


def test_making_a_job_leaves_the_tenants_template_as_it_was() -> None:
    template = {
        "spec": {"containers": [{"name": "main", "image": "x", "resources": {"claims": []}}], "tolerations": []}
    }
    one = admitted(pods=2, template=copy.deepcopy(template))
    manifests.job(one, 1, ("n1",))
    assert one.spec.template == template


def test_a_gang_finds_itself_through_a_headless_service_that_also_names_pods_that_are_not_ready() -> None:
    gang = admitted(pods=2, template=CONTAINERS)
    made = manifests.service(gang)
    assert made["spec"]["clusterIP"] == "None"
    assert made["spec"]["publishNotReadyAddresses"] is True
    assert made["spec"]["selector"] == {names.LABEL_HOLDER: "uid-train"}
    assert manifests.job(gang, 1, ("n1",))["spec"]["template"]["spec"]["subdomain"] == made["metadata"]["name"]


def test_a_miner_is_held_to_its_node_and_its_claim_to_its_very_device() -> None:
    claim = manifests.miner_claim(pool(), "n1", slot())
    pod = manifests.miner_pod(pool(), "n1", slot().device, CLAIM_UID)
    assert pod["metadata"]["name"].startswith(f"{claim['metadata']['name']}-")
    again = manifests.miner_pod(pool(), "n1", slot().device, "another")
    assert again["metadata"]["name"] != pod["metadata"]["name"], "no pod is called as another was before it"
    expression = claim["spec"]["devices"]["requests"][0]["exactly"]["selectors"][0]["cel"]["expression"]
    assert '.parentUuid == "GPU-3"' in expression
    assert expression.endswith(".start == 0")
    terms = pod["spec"]["affinity"]["nodeAffinity"][NODE_TERMS[-1]]["nodeSelectorTerms"]
    assert terms == [{"matchFields": _on("n1")}]
    assert pod["spec"]["resourceClaims"][0]["resourceClaimName"] == claim["metadata"]["name"]


def test_a_miners_container_is_what_the_pool_says_and_nothing_else() -> None:
    mining = pool(
        image="registry.invalid/xmr@sha256:1f",
        command=["/bin/miner", "--quiet"],
        args=["--url", "stratum"],
        env=[{"name": "REGION", "value": "eu"}, {"name": "EMPTY"}],
        resources={"cpu": "2", "memory": "3Gi"},
        payoutSecretRef={"name": "wallet"},
    )
    [container] = manifests.miner_pod(mining, "n1", "gpu3-9f2c41", CLAIM_UID)["spec"]["containers"]
    assert container == {
        "name": "miner",
        "image": "registry.invalid/xmr@sha256:1f",
        "command": ["/bin/miner", "--quiet"],
        "args": ["--url", "stratum"],
        "env": [{"name": "REGION", "value": "eu"}, {"name": "EMPTY", "value": ""}],
        "resources": {
            "requests": {"cpu": "2", "memory": "3Gi"},
            "limits": {"cpu": "2", "memory": "3Gi"},
            "claims": [{"name": "gpu"}],
        },
        "volumeMounts": [{"name": "payout", "mountPath": "/etc/gpu-tenancy/payout", "readOnly": True}],
    }


def test_a_payout_secret_is_mounted_as_files_and_appears_nowhere_else() -> None:
    mining = pool(
        payoutSecretRef={"name": "wallet"}, args=["--url", "stratum"], env=[{"name": "REGION", "value": "eu"}]
    )
    pod = manifests.miner_pod(mining, "n1", "gpu3-9f2c41", CLAIM_UID)["spec"]
    assert pod["volumes"] == [{"name": "payout", "secret": {"secretName": "wallet"}}]
    [container] = pod["containers"]
    [mount] = container["volumeMounts"]
    assert (mount["mountPath"], mount["readOnly"]) == ("/etc/gpu-tenancy/payout", True)
    assert "envFrom" not in container
    assert "wallet" not in json.dumps([container["args"], container["env"], container.get("command")])
    assert "wallet" not in json.dumps(manifests.miner_pod(mining, "n1", "gpu3-9f2c41", CLAIM_UID)["metadata"])


def test_a_miner_gets_no_token_and_no_more_than_it_asked_for() -> None:
    mining = pool(resources={"cpu": "2", "memory": "3Gi"}, graceSeconds=4)
    pod = manifests.miner_pod(mining, "n1", "gpu3-9f2c41", CLAIM_UID)["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["terminationGracePeriodSeconds"] == 4
    resources = pod["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"] == {"cpu": "2", "memory": "3Gi"}
    assert "volumes" not in pod


def test_a_pool_without_command_or_arguments_leaves_the_images_own() -> None:
    [container] = manifests.miner_pod(pool(), "n1", "gpu3-9f2c41", CLAIM_UID)["spec"]["containers"]
    assert not {"command", "args"} & container.keys()


def test_a_record_outlives_its_lease_and_is_kept_until_it_is_archived() -> None:
    made = manifests.usage_record(Key("team-a", "train"), "uid-train-1", record_spec())
    assert "ownerReferences" not in made["metadata"]
    assert made["metadata"]["finalizers"] == [names.FINALIZER_LEDGER]
    assert "billableTo" not in made["spec"]


def test_an_archived_record_says_the_same_and_is_held_by_nothing() -> None:
    one = record(billableTo="2026-03-01T11:00:05Z", seconds=5, reason="Expired")
    made = manifests.archived_record(one, "gpu-tenancy-system")
    assert made["metadata"] == {"namespace": "gpu-tenancy-system", "name": "uid-train-1"}
    assert made["spec"] == one.spec.to_wire()


def test_a_name_too_long_for_a_label_is_cut_so_that_it_stays_one() -> None:
    long = pool("p" * 62 + "-x")
    assert manifests.miner_pod(long, "n1", "gpu3-9f2c41", CLAIM_UID)["metadata"]["labels"][names.LABEL_POOL] == "p" * 62
