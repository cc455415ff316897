"""What the demo's picture shows of a hand-made snapshot, as text at the sizes of a small and of a wide terminal."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from rich.console import Console

from gpu_tenancy.api import names
from tests.cluster.api import Object
from tests.cluster.picture import Scene, Step, StepState, picture

NOW = datetime(2026, 3, 1, 12, 3, 41, tzinfo=UTC)
MODEL = "A100-SXM4-80GB"
SIZES = [(80, 24), (140, 40)]
CONDITION = {"lastTransitionTime": "2026-03-01T12:00:00Z", "observedGeneration": 1}
STEPS = (
    Step("all 16 GPUs mine", StepState.DONE, 1.2, "all 16 GPUs mine: 14 whole, 2 slices"),
    Step("train takes 4 GPUs", StepState.NOW, 0.7, "$ kubectl apply -f train.yaml", "lease train to be Ready"),
    *(Step(f"what comes as number {number}") for number in range(3, 15)),
)


def holder(name: str, kind: str = "GpuLease") -> Object:
    return {"kind": kind, "namespace": "team-a", "name": name, "uid": f"uid-{name}"}


MINERS = holder("idle", "MiningPool")


def slot(gpu: int, owner: Object, state: str = "Ready", profile: str = "full", start: int = 0) -> Object:
    """A device as it is observed; see `node` for what of it is wanted."""
    shape = profile.replace(".", "")
    return {
        "device": f"gpu{gpu}-{shape}-{start}-{owner['name']}",
        "gpu": f"GPU-{gpu}",
        "profile": profile,
        "start": start,
        "holder": owner,
        "state": state,
    }


def node(name: str, slots: Sequence[Object], mig: Sequence[int] = (), sick: Sequence[int] = ()) -> Object:
    """A GpuNode with 8 GPUs whose devices are wanted unless they are draining."""
    gpus = [
        {
            "index": index,
            "uuid": f"GPU-{index}",
            "model": MODEL,
            "memoryMib": 81920,
            "mode": "MIG" if index in mig else "Whole",
            "healthy": index not in sick,
        }
        for index in range(8)
    ]
    wanted = [
        {key: one[key] for key in ("device", "gpu", "profile", "start", "holder")} | {"since": "2026-03-01T12:00:00Z"}
        for one in slots
        if one["state"] != "Draining"
    ]
    seen = [one for one in slots if one["state"] != "Wanted"]
    ready = {"type": "Ready", "status": "True", "reason": "Ready", **CONDITION}
    return {
        "metadata": {"name": name, "uid": f"uid-{name}"},
        "spec": {"slots": wanted},
        "status": {"gpus": gpus, "slots": seen, "conditions": [ready]},
    }


def miner(node_name: str, device: str) -> Object:
    return {
        "metadata": {"name": f"miner-{device}", "labels": {names.LABEL_POOL: "idle", names.LABEL_DEVICE: device}},
        "spec": {"nodeName": node_name},
        "status": {"phase": "Running"},
    }


def lease(name: str, profile: str = "full", count: int = 1, pods: int = 1, **status: object) -> Object:
    reason = status.pop("reason", "Ready")
    message = status.pop("message", "")
    ready = {"type": "Ready", "status": "True" if reason == "Ready" else "False", "reason": reason, **CONDITION}
    others = status.pop("others", [])
    assert isinstance(others, list)
    return {
        "metadata": {"name": name, "namespace": "team-a", "uid": f"uid-{name}"},
        "spec": {"gpus": {"profile": profile, "count": count}, "pods": pods},
        "status": {"conditions": [ready | {"message": message}, *others], **status},
    }


def record(name: str, devices: int, began: str, **closed: object) -> Object:
    return {
        "metadata": {"name": f"uid-{name}-1"},
        "spec": {
            "contract": f"uid-{name}",
            "segment": 1,
            "leaseNamespace": "team-a",
            "leaseName": name,
            "tier": "OnDemand",
            "model": MODEL,
            "profile": "full",
            "devices": [{"node": "gpu-a", "device": f"d{index}", "gpu": f"GPU-{index}"} for index in range(devices)],
            "price": {"perHour": "145.00", "currency": "RUB", "book": "list"},
            "billableFrom": began,
            **closed,
        },
    }


def scene(**changes: object) -> Scene:
    """Two nodes in the middle of a story."""
    first = [slot(gpu, holder("train")) for gpu in range(4)] + [slot(gpu, MINERS) for gpu in range(4, 7)]
    second = [
        slot(0, MINERS, "Draining"),
        slot(0, holder("pretrain"), "Preparing"),
        slot(1, holder("train"), "Draining"),
        slot(2, holder("pretrain"), "Wanted"),
        slot(3, MINERS),
        slot(6, MINERS, profile="4g.40gb"),
        slot(6, holder("evaluate"), profile="3g.40gb", start=4),
        slot(7, MINERS, profile="2g.20gb"),
        slot(7, holder("notebook"), profile="2g.20gb", start=2),
    ]
    told = {"type": "Expired", "status": "False", "reason": "NoticeGiven", "message": "", **CONDITION}
    price = {"perHour": "145.00", "currency": "RUB", "book": "list"}
    wait = "Position 1 in the queue: needs room for 3 pods with 4 free GPUs (A100-SXM4-80GB), 16 CPU and 128Gi memory "
    wait += "each; there is room for 2 beside the leases that run."
    content: dict[str, object] = {
        "now": NOW,
        "elapsed": 21.4,
        "nodes": [node("gpu-a", first), node("gpu-b", second, mig=(6, 7), sick=(5,))],
        "leases": [
            lease("train", count=4, expiresAt="2026-03-01T12:05:46Z", price=price),
            lease("evaluate", "3g.40gb", others=[told], expiresAt="2026-03-01T12:03:50Z"),
            lease("pretrain", count=4, pods=3, reason="Queued", message=wait, position=1),
            lease("former", ended={"at": "2026-03-01T12:00:00Z", "reason": "Deleted"}),
        ],
        "gone": frozenset({"uid-former"}),
        "pods": [miner("gpu-a", f"gpu{gpu}-full-0-idle") for gpu in (4, 5)]
        + [miner("gpu-b", "gpu6-4g40gb-0-idle"), miner("gpu-b", "gpu7-2g20gb-0-idle")],
        "records": [
            record("train", 4, "2026-03-01T12:03:11Z"),
            record("former", 1, "2026-03-01T11:00:00Z", billableTo="2026-03-01T12:00:00Z", seconds=3600,
                   reason="Deleted"),
        ],
        "steps": STEPS,
    }  # fmt: skip
    return Scene(**(content | changes))  # type: ignore[arg-type]


def drawn(what: Scene, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        console.print(picture(what, width, height))
    return captured.get().splitlines()


def line_with(lines: Sequence[str], *words: str) -> str:
    found = [line for line in lines if all(word in line for word in words)]
    assert len(found) == 1, f"{words} in {len(found)} lines of:\n" + "\n".join(lines)
    return found[0]


def gpu_line(lines: Sequence[str], index: int) -> tuple[str, str]:
    """The bars of GPU `index` of the one and the other node."""
    found = re.fullmatch(rf" {index}[m ] (.*?) +{index}[m ] (.*)", lines[2 + index])
    assert found, lines[2 + index]
    return found[1], found[2].rstrip()


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_it_fits_the_terminal(width: int, height: int) -> None:
    lines = drawn(scene(), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize(("width", "height"), [(40, 10), (60, 20), (80, 12), (250, 80)])
def test_it_fits_odd_terminals_too(width: int, height: int) -> None:
    lines = drawn(scene(), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_each_gpu_shows_its_holder_and_its_slices(width: int, height: int) -> None:
    lines = drawn(scene(), width, height)
    line_with(lines, "gpu-a  8 × A100-SXM4-80GB", "gpu-b  8 × A100-SXM4-80GB (2 MIG)")
    assert gpu_line(lines, 2)[0].strip() == "train"
    assert gpu_line(lines, 4)[0].strip() == "miner"
    assert gpu_line(lines, 6)[0].strip() == "miner starts"
    assert [part.strip() for part in gpu_line(lines, 6)[1].split("│")] == ["4g miner", "3g evaluate"]
    assert lines[8].count("6m") == 1, "one of the two GPUs with index 6 is in MIG mode"


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_hand_over_names_both_sides(width: int, height: int) -> None:
    lines = drawn(scene(), width, height)
    assert gpu_line(lines, 0)[1].strip() == "miner → pretrain"
    assert gpu_line(lines, 1)[1].strip() == "train →"
    assert gpu_line(lines, 2)[1].strip() == "→ pretrain"


def test_a_device_that_is_ready_hides_what_is_left_of_its_forerunner() -> None:
    slots = [
        slot(0, holder("former"), "Draining", "2g.20gb", 4),
        slot(0, holder("train"), profile="3g.40gb", start=4),
        slot(0, MINERS, "Preparing", "4g.40gb"),
    ]
    lines = drawn(scene(nodes=[node("gpu-a", slots, mig=[0]), node("gpu-b", [])]), 80, 24)
    assert [part.strip() for part in gpu_line(lines, 0)[0].split("│")] == ["→ miner", "3g train"]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_idle_and_faulty_gpus_are_named(width: int, height: int) -> None:
    lines = drawn(scene(), width, height)
    assert gpu_line(lines, 7)[0].strip(" ·") == "idle"
    assert gpu_line(lines, 5)[1].strip() == "faulty"


def test_slices_have_their_share_of_the_width() -> None:
    for width, cell in ((80, 4), (140, 8)):
        bar = gpu_line(drawn(scene(), width, 40), 7)[1]
        assert [bar.index("│"), bar.rindex("│")] == [2 * cell, 4 * cell]
        assert bar[4 * cell + 1 :].strip("·") == "idle "


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_queue_shows_position_and_reason(width: int, height: int) -> None:
    lines = drawn(scene(), width, height)
    at = lines.index(line_with(lines, "1  pretrain needs room for 3 pods with 4 free GPUs"))
    text = " ".join(line.strip() for line in lines[at : at + 2])
    assert text.endswith("16 CPU and 128Gi memory each; there is room for 2 beside the leases that run.")
    line_with(lines, "pretrain", "Queued, number 1", "3 × 4 whole")


def test_there_is_no_queue_where_nobody_waits() -> None:
    lines = drawn(scene(leases=[lease("train", count=4)]), 80, 24)
    assert not [line for line in lines if line.startswith(" ─ queue")]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_clock_and_the_money_run(width: int, height: int) -> None:
    lines = drawn(scene(), width, height)
    # train: 4 × 30 s at 145 an hour = 4.8333…; former: an hour at 145.
    assert lines[0].rstrip().endswith("149.83 RUB  12:03:41")
    line_with(lines, "─ step 2 of 14, 21.4 s ─")
    assert line_with(lines, " ■ train").split()[2:] == ["Ready", "4", "whole", "2:05", "145.00", "4.83"]
    assert line_with(lines, " ■ former").split()[2:] == ["deleted", "1", "whole", "145.00"]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_top_line_counts_every_gpu_once(width: int, height: int) -> None:
    # train 4, evaluate half, notebook a quarter; miners 3 + 1 + a half + a quarter; two to pretrain and one from train.
    top = drawn(scene(), width, height)[0]
    assert "leased 4.75  mining 4.75  hand-over 3  idle 2.5  faulty 1" in top


def test_a_lease_that_was_told_of_its_end_says_so() -> None:
    assert "Ready, notice given" in line_with(drawn(scene(), 80, 24), " ■ evaluate")


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_present_step_shows_with_its_command_and_what_it_waits_for(width: int, height: int) -> None:
    lines = drawn(scene(), width, height)
    at = lines.index(line_with(lines, "▶   0.7 s  train takes 4 GPUs"))
    assert lines[at + 1].strip() == "$ kubectl apply -f train.yaml"
    assert lines[at + 2].strip() == "waits for lease train to be Ready"


def test_a_high_terminal_shows_all_steps_and_what_the_colours_mean() -> None:
    lines = drawn(scene(), 140, 40)
    line_with(lines, "✓   1.2 s  all 16 GPUs mine")
    line_with(lines, "what comes as number 14")
    line_with(lines, "lease", "miner", "hand-over", "faulty", "idle")


@pytest.mark.parametrize("reached", range(1, 15))
def test_a_low_terminal_always_shows_the_present_step(reached: int) -> None:
    done = [Step(f"number {number}", StepState.DONE, 1.0) for number in range(1, reached)]
    ahead = [Step(f"number {number}") for number in range(reached + 1, 15)]
    lines = drawn(scene(steps=[*done, Step(f"number {reached}", StepState.NOW, 0.5), *ahead]), 80, 24)
    line_with(lines, f"▶   0.5 s  number {reached}")


def test_a_step_that_failed_is_marked() -> None:
    line_with(drawn(scene(steps=[Step("all mine", StepState.FAILED, 30.0)]), 80, 24), "✗  30.0 s  all mine")


def test_an_empty_cluster_can_be_drawn() -> None:
    lines = drawn(Scene(NOW, 0.0, nodes=[{"metadata": {"name": "gpu-a"}}], steps=STEPS), 80, 24)
    line_with(lines, "gpu-a  0 × no GPUs", "no agent")
    assert "leased 0  mining 0" in lines[0]


def test_leases_keep_their_colours_when_one_is_gone() -> None:
    def colours(what: Scene) -> dict[str, str]:
        console = Console(width=80, force_terminal=True, color_system="256")
        with console.capture() as captured:
            console.print(picture(what, 80, 24))
        marked = [line.split("■")[0] for line in captured.get().splitlines() if "■" in line]
        return dict(zip([one["metadata"]["name"] for one in what.leases], marked, strict=True))

    assert colours(scene()) == colours(scene(gone=frozenset({"uid-former", "uid-train"})))
    assert len(set(colours(scene()).values())) == 4
