"""The API server's word on a template is asked for once; what it forbids is asked again, ever more rarely."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gpu_tenancy.controller.vetting import ALIKE_SECONDS, FIRST_PAUSE, LONGEST_PAUSE, Vetting, forbidden
from gpu_tenancy.core.snapshot import LeaseFacts
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.errors import KubeError, Rejected, Transient
from gpu_tenancy.kube.resources import Resource
from tests.unit.controller.facts import CONTAINERS, NOW, Object, admitted, lease

INVALID = Rejected(422, "Invalid", 'Job.batch "train-0" is invalid: spec.template.spec.containers[0].name')
FORBIDDEN = Rejected(403, "Forbidden", 'jobs.batch "train-0" is forbidden: exceeded quota: few')
AWAY = Transient(0, "Unreachable", "no answer")


class Asked:
    """A server that answers the same each time, until it is told otherwise."""

    def __init__(self, error: KubeError | None = None) -> None:
        self.error = error
        self.names: list[str] = []
        self.bodies: list[Object] = []
        self.seconds = 0.0
        self.vetting = Vetting(self, lambda: self.seconds)  # type: ignore[arg-type]

    async def create(self, res: Resource, body: Object, *, dry_run: bool) -> Object:
        assert (res, dry_run) == (resources.JOBS, True)
        self.names.append(body["metadata"]["name"])
        self.bodies.append(body)
        if self.error is not None:
            raise self.error
        return body

    def check(self, *leases: LeaseFacts) -> bool:
        async def ask() -> bool:
            return any([await self.vetting.ask(lease) for lease in self.vetting.due(leases)])

        return asyncio.run(ask())


def _lease(name: str = "train") -> LeaseFacts:
    return lease(name, template=CONTAINERS)


def test_an_accepted_template_is_asked_about_once() -> None:
    asked = Asked()
    assert asked.check(_lease())
    assert not asked.check(_lease())
    assert asked.names == ["train-0"]
    assert asked.vetting.verdicts == {"uid-train": ""}
    assert asked.vetting.again is None


def test_leases_that_are_alike_are_asked_about_once_in_a_while() -> None:
    asked = Asked()
    alike, gang = [_lease("one"), _lease("two")], lease("gang", template=CONTAINERS, pods=2)
    other = lease("other", template={"spec": {**CONTAINERS["spec"], "priority": 1}})
    assert asked.check(*alike, gang, other)
    assert asked.vetting.verdicts == dict.fromkeys(("uid-one", "uid-two", "uid-gang", "uid-other"), "")
    assert asked.names == ["one-0", "gang-0", "other-0"]
    asked.seconds += ALIKE_SECONDS
    asked.check(_lease("three"))
    assert asked.names[3:] == ["three-0"]


@pytest.mark.parametrize("spec", [{"containers": ["main"]}, {"containers": [], "tolerations": "all"}, "none"])
def test_a_template_of_which_no_job_can_be_made_is_refused_and_nobody_is_asked(spec: object) -> None:
    asked = Asked()
    assert asked.check(lease(template={"spec": spec}), _lease("other"))
    assert asked.vetting.verdicts["uid-train"].startswith("spec.template is not a pod template: ")
    assert asked.names == ["other-0"]


def test_the_job_that_is_tried_is_held_to_a_node_as_the_real_one_will_be() -> None:
    asked = Asked()
    asked.check(_lease())
    assert "nodeAffinity" in asked.bodies[0]["spec"]["template"]["spec"]["affinity"]


def test_a_refusal_is_not_shared() -> None:
    asked = Asked(FORBIDDEN)
    assert asked.check(_lease("one"), _lease("two"))
    assert asked.names == ["one-0", "two-0"]


def test_a_refused_template_is_refused_in_the_words_of_the_api_server() -> None:
    asked = Asked(INVALID)
    assert asked.check(_lease())
    assert asked.vetting.verdicts["uid-train"] == f"The API server refuses the Job of this template: {INVALID.message}"
    asked.seconds += FIRST_PAUSE / 2
    assert not asked.check(_lease())
    assert len(asked.names) == 1


def test_a_forbidden_template_is_asked_about_again_and_accepted_once_it_is_allowed() -> None:
    asked = Asked(FORBIDDEN)
    asked.check(_lease())
    assert "exceeded quota: few" in asked.vetting.verdicts["uid-train"]
    assert asked.vetting.again == FIRST_PAUSE
    asked.seconds += FIRST_PAUSE
    asked.error = None
    assert asked.check(_lease())
    assert asked.vetting.verdicts == {"uid-train": ""}


def test_what_stays_forbidden_is_asked_ever_more_rarely_and_changes_nothing() -> None:
    asked, pauses = Asked(FORBIDDEN), []
    asked.check(_lease())
    for _ in range(12):
        pause = asked.vetting.again
        assert pause is not None
        pauses.append(pause)
        asked.seconds += pause - 0.1
        assert not asked.check(_lease())
        asked.seconds += 0.1
        assert not asked.check(_lease())
    assert pauses[:3] == pytest.approx([FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE])
    assert pauses[-1] == LONGEST_PAUSE
    assert len(asked.names) == 1 + len(pauses)


def test_a_server_that_is_away_gives_no_verdict_and_is_asked_again() -> None:
    asked = Asked(AWAY)
    assert not asked.check(_lease())
    assert asked.vetting.verdicts == {}
    assert asked.vetting.again == FIRST_PAUSE
    asked.error, asked.seconds = None, FIRST_PAUSE
    assert asked.check(_lease())


def test_one_template_that_is_refused_does_not_keep_another_from_being_accepted() -> None:
    asked = Asked()
    odd = lease("odd", template={"spec": {**CONTAINERS["spec"], "nodeName": "n1"}})
    assert asked.check(odd, _lease())
    assert asked.vetting.verdicts["uid-train"] == ""
    assert "nodeName" in asked.vetting.verdicts["uid-odd"]
    assert asked.names == ["train-0"]


@pytest.mark.parametrize(
    "one",
    [
        lease(),
        admitted(template=CONTAINERS),
        replace(_lease(), invalid="spec.tier: no"),
        replace(_lease(), unreadable="GpuLease team-a/train cannot be read"),
        replace(_lease(), namespace_ends=True),
        replace(_lease(), deleted_at=NOW),
    ],
    ids=["no-template", "admitted", "invalid", "unreadable", "namespace-ends", "deleted"],
)
def test_nobody_is_asked_about_leases_that_need_no_answer(one: LeaseFacts) -> None:
    asked = Asked()
    assert not asked.check(one)
    assert asked.names == []


def test_verdicts_on_leases_that_are_gone_are_forgotten() -> None:
    asked = Asked()
    asked.check(_lease(), _lease("other"))
    asked.check(_lease("other"))
    assert asked.vetting.verdicts == {"uid-other": ""}


@pytest.mark.parametrize("field", ["nodeName", "schedulerName", "resourceClaims", "priorityClassName"])
def test_what_a_lease_decides_itself_is_refused_with_the_reason(field: str) -> None:
    sentence = forbidden({"spec": {field: "mine"}})
    assert sentence.startswith(f"spec.template.spec.{field} may not be set: ")
    assert sentence.endswith("leave it out.")
    assert forbidden({"spec": {field: None}}) == ""
