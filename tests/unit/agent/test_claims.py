"""Who gets a device: the checks that make `holder` an access control, each with the sentence of its refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.claims import Refusal, admitted
from gpu_tenancy.agent.situation import PreparedClaim, PreparedDevice, Situation
from gpu_tenancy.api.claim import ClaimHolder
from gpu_tenancy.mig.profiles import FULL
from tests.unit.agent.world import EPOCH, MIG_GPU, WHOLE, World, claim_of, slot

WANTED = slot(WHOLE, FULL, 0, 1)
SLICE = slot(MIG_GPU, "3g.40gb", 4, 1)
Body = dict[str, Any]


def serving() -> Situation:
    world = World()
    world.specify([WANTED, SLICE])
    world.settle()
    return world.agent


def claim(*devices: str, holder: str = "uid-1", namespace: str = "team-1") -> Body:
    return claim_of(devices, holder=holder, namespace=namespace, uid="claim-1")


def test_the_holders_own_claim_gets_its_devices() -> None:
    assert admitted(serving(), "n1", claim(WANTED.device, SLICE.device), "claim-1") == PreparedClaim(
        uid="claim-1",
        namespace="team-1",
        name="train",
        devices=(
            PreparedDevice(device=WANTED.device, requests=("gpus",)),
            PreparedDevice(device=SLICE.device, requests=("gpus",)),
        ),
        users=("train-0",),
        pods=("p",),
    )


def test_asking_twice_gets_the_same_answer() -> None:
    situation = serving()
    first = admitted(situation, "n1", claim(WANTED.device), "claim-1")
    assert admitted(known.claimed(situation, first), "n1", claim(WANTED.device), "claim-1") == first


def test_devices_of_other_drivers_and_nodes_are_not_this_agents_matter() -> None:
    body = claim(WANTED.device)
    foreign = {"driver": "nic.example", "pool": "n1", "device": "nic0", "request": "nic"}
    elsewhere = {"driver": "gpu-tenancy.dev", "pool": "n2", "device": "gpu0-abcdef", "request": "gpus"}
    body["status"]["allocation"]["devices"]["results"] += [foreign, elsewhere]
    assert [one.device for one in admitted(serving(), "n1", body, "claim-1").devices] == [WANTED.device]


def edit(change: Callable[[Body], object]) -> Callable[[Body], Body]:
    def changed(body: Body) -> Body:
        body = copy.deepcopy(body)
        change(body)
        return body

    return changed


def config(body: Body) -> Body:
    entry: Body = body["spec"]["devices"]["config"][0]
    return entry


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (edit(lambda body: body["metadata"].update(uid="claim-2")), "it was deleted and made anew"),
        (edit(lambda body: body["metadata"].update(namespace="team-9")), "claim team-9/train is of another namespace"),
        (edit(lambda body: config(body)["opaque"]["parameters"].update(holder="uid-9")), "was made for uid-9"),
        (edit(lambda body: config(body)["opaque"].update(parameters={"holder": 7})), "was made for nobody"),
        (edit(lambda body: config(body)["opaque"].update(driver="nic.example")), "was made for nobody"),
        (edit(lambda body: config(body).update(requests=["other"])), "was made for nobody"),
        (edit(lambda body: body["spec"]["devices"].pop("config")), "use the ResourceClaimTemplate of the lease"),
        (edit(lambda body: body["status"].pop("allocation")), "has no device of gpu-tenancy.dev allocated on node n1"),
        (
            edit(lambda body: body["status"]["allocation"]["devices"]["results"][0].update(adminAccess=True)),
            "asks for admin access",
        ),
        (
            edit(lambda body: body["status"]["allocation"]["devices"]["results"][0].update(device="gpu0-gone")),
            "device gpu0-gone does not exist on this node any more",
        ),
    ],
)
def test_a_claim_that_is_not_the_holders_is_refused(change: Callable[[Body], Body], sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence):
        admitted(serving(), "n1", change(claim(WANTED.device)), "claim-1")


def test_two_configurations_that_name_two_holders_are_no_configuration() -> None:
    body = claim(WANTED.device)
    other = {"driver": "gpu-tenancy.dev", "parameters": ClaimHolder(holder="uid-9").to_wire()}
    body["spec"]["devices"]["config"].append({"opaque": other})
    with pytest.raises(Refusal, match="was made for nobody"):
        admitted(serving(), "n1", body, "claim-1")


def test_a_configuration_for_the_request_counts_and_one_for_its_alternative_too() -> None:
    body = claim(WANTED.device)
    config(body)["requests"] = ["gpus"]
    body["status"]["allocation"]["devices"]["results"][0]["request"] = "gpus/whole"
    assert admitted(serving(), "n1", body, "claim-1").devices[0].requests == ("gpus/whole",)


def test_a_device_that_is_being_taken_away_goes_to_nobody() -> None:
    situation = known.specified(serving(), [], 2)
    with pytest.raises(Refusal, match="is being taken away from team-1/holder-1"):
        admitted(situation, "n1", claim(WANTED.device), "claim-1")


def test_a_device_that_is_not_ready_goes_to_nobody_and_says_why() -> None:
    situation = known.failed(serving(), WANTED.device, "no room", EPOCH)
    with pytest.raises(Refusal, match="is Failed, not Ready: no room"):
        admitted(situation, "n1", claim(WANTED.device), "claim-1")


def test_a_device_on_a_sick_gpu_goes_to_nobody() -> None:
    situation = serving()
    sick = known.facts_with(situation.gpus[WHOLE], healthy=False, message="Xid 79")
    situation = known.listed(situation, [sick, situation.gpus[MIG_GPU]])
    with pytest.raises(Refusal, match="GPU 1 is not healthy: Xid 79"):
        admitted(situation, "n1", claim(WANTED.device), "claim-1")


def test_a_slice_whose_instance_is_not_known_again_yet_waits() -> None:
    situation = replace(serving(), instances={})
    with pytest.raises(Refusal, match="waits until the driver lists the MIG instances"):
        admitted(situation, "n1", claim(SLICE.device), "claim-1")
    assert admitted(situation, "n1", claim(WANTED.device), "claim-1").uid == "claim-1"


def test_a_slice_whose_instance_was_destroyed_by_somebody_goes_to_nobody() -> None:
    situation = known.walked(serving(), MIG_GPU, [])
    with pytest.raises(Refusal, match="lost its MIG instance and is being made again"):
        admitted(situation, "n1", claim(SLICE.device), "claim-1")


def test_a_device_is_prepared_for_one_claim_at_a_time() -> None:
    situation = serving()
    first = admitted(situation, "n1", claim(WANTED.device), "claim-1")
    body = claim(WANTED.device)
    body["metadata"] |= {"uid": "claim-2", "name": "second"}
    with pytest.raises(Refusal, match="still prepared for claim team-1/train"):
        admitted(known.claimed(situation, first), "n1", body, "claim-2")


def test_one_device_too_many_refuses_the_whole_claim() -> None:
    with pytest.raises(Refusal, match="does not exist"):
        admitted(serving(), "n1", claim(WANTED.device, "gpu9-abcdef"), "claim-1")
