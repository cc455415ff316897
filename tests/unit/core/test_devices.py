"""Derived names: unique, stable, and legal wherever Kubernetes takes them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.core.devices import device_name, job_name, miner_name, miner_pod_name, start_of

LABEL = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
NODE_NAMES = st.from_regex(r"\A[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?){0,3}\Z")
LEASE_NAMES = st.from_regex(r"\A[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
PROFILES = st.sampled_from(["full", "1g.10gb", "3g.40gb", "7g.80gb"])


def test_a_device_is_named_by_its_placement_and_its_holder() -> None:
    assert re.fullmatch(r"gpu3-[0-9a-f]{6}", device_name(3, "full", 0, "uid", 1))
    assert re.fullmatch(r"gpu3-1g10gb-6-[0-9a-f]{6}", device_name(3, "1g.10gb", 6, "uid", 1))


@given(index=st.integers(0, 63), profile=PROFILES, start=st.integers(0, 7), uid=st.uuids())
def test_a_devices_name_tells_where_on_its_gpu_it_is(index: int, profile: str, start: int, uid: object) -> None:
    device = device_name(index, profile, start, str(uid), 1)
    assert start_of(device) == (0 if profile == "full" else start)


@pytest.mark.parametrize(
    "name", ["", "gpu3", "gpu3-1g10gb-9f2c41", "gpu3-1g10gb-8-9f2c41", "mig-9f2c41", "gpu3-9f2c41-x"]
)
def test_a_name_that_is_not_ours_tells_nothing(name: str) -> None:
    assert start_of(name) is None


def test_another_holder_or_another_attempt_is_another_device() -> None:
    names = {device_name(0, "full", 0, uid, attempt) for uid in ("one", "other") for attempt in (1, 2)}
    assert len(names) == 4


@given(index=st.integers(0, 63), profile=PROFILES, start=st.integers(0, 7), uid=st.uuids(), node=NODE_NAMES)
def test_devices_and_miners_have_legal_names(index: int, profile: str, start: int, uid: object, node: str) -> None:
    device = device_name(index, profile, start, str(uid), 1)
    miner = miner_name(node, device)
    for name in (device, miner, miner_pod_name(miner, str(uid))):
        assert LABEL.match(name)
        assert len(name) <= 63


@given(node=NODE_NAMES, other=NODE_NAMES, start=st.integers(0, 6))
def test_miners_on_different_devices_have_different_names(node: str, other: str, start: int) -> None:
    device = device_name(0, "1g.10gb", start, "uid", 1)
    assert (miner_name(node, device) == miner_name(other, device)) == (node == other)


@given(name=LEASE_NAMES, attempt=st.integers(1, 10_000))
def test_jobs_have_legal_names_that_leave_room_for_their_pods(name: str, attempt: int) -> None:
    """A pod of an indexed Job is named <job>-<index>-<five characters>; its hostname <job>-<index> is a DNS label."""
    job = job_name(name, attempt)
    assert LABEL.match(job)
    assert len(f"{job}-63") <= 63
    assert job != job_name(name, attempt + 1)


def test_long_names_of_leases_that_differ_at_the_end_stay_apart() -> None:
    one, other = "a" * 62 + "b", "a" * 62 + "c"
    assert job_name(one, 1) != job_name(other, 1)
    assert job_name("train", 2) == "train-2"
