"""The live picture: every GPU with its holders, the queue, the clock, the money, the steps of the story.

A pure function of what the API server showed at one instant: nothing is asked, waited for or decided here. It draws
lines of text that fit the width and the height it is given, from 80×24 upwards.
"""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from itertools import chain, groupby
from typing import Final, NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from gpu_tenancy.api import names
from gpu_tenancy.api.base import ConditionStatus, Holder, HolderKind
from gpu_tenancy.api.lease import ConditionType, GpuLeaseSpec, GpuLeaseStatus, Reason
from gpu_tenancy.api.node import Gpu, GpuMode, GpuNodeSpec, GpuNodeStatus, NodeReason, ObservedSlot, Slot, SlotState
from gpu_tenancy.core.slices import SliceState
from gpu_tenancy.mig.profiles import FULL, MEMORY_SLICES, slices
from tests.cluster import bill
from tests.cluster.api import Object

GAP: Final = 2
"""Columns between two nodes."""
MARGIN: Final = 4
"""Columns before a GPU's bar: its index, and m where it is in MIG mode."""
PALETTE: Final = ("green3", "deep_sky_blue1", "orchid", "aquamarine1", "light_slate_blue", "misty_rose1")
"""Colours of leases, oldest first; light ones, because names are written on them in black."""
ROOMY: Final = 110
"""Columns from which on a lease's line says why it is as it is."""
MINER: Final = "white on grey30"
MOVING: Final = "black on gold1"
FAULTY: Final = "white on red"
IDLE: Final = "grey50"


class StepState(StrEnum):
    """How far a step of the story is."""

    AHEAD = "ahead"
    NOW = "now"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the story."""

    title: str
    state: StepState = StepState.AHEAD
    seconds: float | None = None
    """How long it took, or has taken so far."""
    note: str = ""
    """The command that was typed last, or, once it is done, what was seen."""
    awaits: str = ""
    """What the story looks for right now."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What the picture shows: objects as the API server gives them, at one instant."""

    now: datetime
    elapsed: float
    """Seconds since the story began."""
    nodes: Sequence[Object] = ()
    """GpuNodes."""
    leases: Sequence[Object] = ()
    """GpuLeases, oldest first; those that were deleted too."""
    gone: frozenset[str] = frozenset()
    """UIDs of the leases that do not exist any more."""
    pods: Sequence[Object] = ()
    records: Sequence[Object] = ()
    """UsageRecords."""
    steps: Sequence[Step] = ()


class Stretch(NamedTuple):
    """Neighbouring slices of one GPU that are in the same hand."""

    size: int
    """Memory slices."""
    hand: SliceState
    label: str
    style: str


def picture(scene: Scene, width: int, height: int) -> RenderableType:
    """The scene in `width` columns and at most `height` lines; what is over comes off the finished steps first."""
    colours = _colours(scene)
    tables = [_stretches(node, scene, colours) for node in scene.nodes]
    blocks = [
        [_headline(scene, tables, width), *_nodes(scene, tables, width)],
        [*_leases(scene, colours, width), *_queue(scene, width)],
    ]
    room = height - sum(map(len, blocks))
    wanted = sum(len(_step(step)) for step in scene.steps) + 1
    if room > wanted + 3:
        blocks[0] += [_legend(), Text()]
        blocks[1].append(Text())
        room -= 3
    lines = [*chain.from_iterable(blocks), *_steps(scene, width, room)]
    return Group(*(_fitted(line, width) for line in lines[:height]))


# --- the top line -------------------------------------------------------------------------------------------------


def _headline(scene: Scene, tables: Iterable[Sequence[Sequence[Stretch]]], width: int) -> Text:
    """What is in whose hand, in GPUs; the clock; the money of all leases."""
    hands = dict.fromkeys(SliceState, 0)
    for stretch in (one for table in tables for gpu in table for one in gpu):
        hands[stretch.hand] += stretch.size
    shown = [hand for hand in SliceState if hands[hand] or hand in (SliceState.LEASED, SliceState.MINING)]
    counts = "  ".join(f"{hand} {hands[hand] / MEMORY_SLICES:g}" for hand in shown)
    lines = bill.lines(scene.records, scene.now)
    money = f"{bill.total(lines):f} {lines[0].currency}" if lines else "0.00"
    right = Text.assemble(" ", (money, "bold"), f"  {scene.now:%H:%M:%S}")
    left = Text.assemble((" gpu-tenancy ", "bold reverse"), f"  GPUs: {counts}")
    if left.cell_len + right.cell_len > width:
        left = Text(counts)
    return left.append(" " * max(0, width - left.cell_len - right.cell_len)).append_text(right)


# --- nodes and GPUs -----------------------------------------------------------------------------------------------


def _nodes(scene: Scene, tables: Sequence[Sequence[Sequence[Stretch]]], width: int) -> Iterator[Text]:
    """Nodes in pairs, side by side; each GPU is a line."""
    cell = max(2, ((width - GAP) // 2 - MARGIN - 1) // MEMORY_SLICES)
    wide = MARGIN + cell * MEMORY_SLICES
    blocks = [
        [_node_line(node), *_gpu_lines(node, table, cell)] for node, table in zip(scene.nodes, tables, strict=True)
    ]
    for index in range(0, len(blocks), 2):
        pair = blocks[index : index + 2]
        for row in range(max(map(len, pair))):
            line = Text()
            for block in pair:
                part = block[row].copy() if row < len(block) else Text()
                part.truncate(wide, overflow="ellipsis", pad=True)
                line.append_text(part).append(" " * GAP)
            yield line


def _node_line(node: Object) -> Text:
    status = _node_status(node)
    ready = next((one for one in status.conditions), None)
    mig = sum(gpu.mode is GpuMode.MIG for gpu in status.gpus)
    model = status.gpus[0].model if status.gpus else "no GPUs"
    fine = ready is not None and (ready.status is ConditionStatus.TRUE or ready.reason is NodeReason.WORKING)
    trouble = "" if fine else f"  {ready.reason if ready else 'no agent'}"
    text = Text.assemble((f" {node['metadata']['name']}", "bold"), f"  {len(status.gpus)} × {model}")
    return text.append(f" ({mig} MIG)" if mig else "").append(trouble, "bold red")


def _gpu_lines(node: Object, table: Sequence[Sequence[Stretch]], cell: int) -> Iterator[Text]:
    for gpu, stretches in zip(_gpus(node), table, strict=True):
        mark = "m" if gpu.mode is GpuMode.MIG else " "
        line = Text(f"{gpu.index:>2}{mark} ", "bold")
        start = 0
        for stretch in stretches:
            line.append_text(_bar(stretch, cell * stretch.size, first=start == 0))
            start += stretch.size
        yield line


def _bar(stretch: Stretch, width: int, *, first: bool) -> Text:
    """A stretch of a bar, with its label as far as there is room; a line keeps neighbours apart."""
    text = Text(" " if first else "│", stretch.style)
    text.append(stretch.label)
    text.truncate(width, overflow="crop")
    text.pad_right(width - text.cell_len, "·" if stretch.hand is SliceState.IDLE else " ")
    return text


def _stretches(node: Object, scene: Scene, colours: Mapping[str, str]) -> list[list[Stretch]]:
    """Each GPU of the node as stretches of slices, from slice 0 to 7."""
    running = _running(node["metadata"]["name"], scene.pods)
    wanted = {slot.device: slot for slot in GpuNodeSpec.model_validate(node.get("spec") or {}).slots}
    observed = {slot.device: slot for slot in _node_status(node).slots}
    found = []
    for gpu in _gpus(node):
        cover = _cover(gpu, wanted, observed)
        groups = groupby(range(MEMORY_SLICES), key=lambda index, cover=cover: cover[index])  # type: ignore[misc]
        found.append([_stretch(gpu, key, len(list(part)), wanted, observed, running, colours) for key, part in groups])
    return found


def _gpus(node: Object) -> list[Gpu]:
    return sorted(_node_status(node).gpus, key=lambda gpu: gpu.index)


def _node_status(node: Object) -> GpuNodeStatus:
    return GpuNodeStatus.model_validate(node.get("status") or {})


def _cover(gpu: Gpu, wanted: Mapping[str, Slot], observed: Mapping[str, ObservedSlot]) -> list[tuple[str, str]]:
    """For each slice the devices (former, present) that take it; empty names where there is none."""
    former, present = [""] * MEMORY_SLICES, [""] * MEMORY_SLICES
    both: dict[str, Slot | ObservedSlot] = {**observed, **wanted}
    for device, slot in both.items():
        if slot.gpu == gpu.uuid:
            column = present if device in wanted else former
            for index in range(slot.start, slot.start + slices(gpu.model, slot.profile)):
                column[index] = device
    # A device that is ready is in use, whatever its agent still says of the one before it.
    ready = {device for device, slot in observed.items() if slot.state is SlotState.READY}
    return [("" if now in ready else before, now) for before, now in zip(former, present, strict=True)]


def _stretch(
    gpu: Gpu,
    key: tuple[str, str],
    size: int,
    wanted: Mapping[str, Slot],
    observed: Mapping[str, ObservedSlot],
    running: frozenset[str],
    colours: Mapping[str, str],
) -> Stretch:
    former, present = (observed.get(key[0]), wanted.get(key[1]))
    report = observed.get(key[1])
    if not gpu.healthy or (report is not None and report.state is SlotState.FAILED):
        return Stretch(size, SliceState.FAULTY, f"faulty {present.holder.name if present else ''}", FAULTY)
    if present is None and former is None:
        return Stretch(size, SliceState.IDLE, "idle ", IDLE)
    if present is None or report is None or report.state is not SlotState.READY:
        return Stretch(size, SliceState.HAND_OVER, f"{_holder(former)}→ {_holder(present)}".strip(), MOVING)
    shape = "" if present.profile == FULL else f"{present.profile.split('.')[0]} "
    if present.holder.kind is HolderKind.GPU_LEASE:
        return Stretch(
            size, SliceState.LEASED, shape + present.holder.name, f"black on {_colour(present.holder, colours)}"
        )
    runs = present.device in running
    return Stretch(size, SliceState.MINING, f"{shape}miner{'' if runs else ' starts'}", MINER)


def _holder(slot: Slot | ObservedSlot | None) -> str:
    """A holder's name with a blank behind it; miners are miners whatever their pool is called."""
    if slot is None:
        return ""
    return "miner " if slot.holder.kind is HolderKind.MINING_POOL else f"{slot.holder.name} "


def _colour(holder: Holder, colours: Mapping[str, str]) -> str:
    return colours.get(holder.uid, PALETTE[0])


def _colours(scene: Scene) -> dict[str, str]:
    """Colour of each lease by its UID: by age, so that it keeps it."""
    return {lease["metadata"]["uid"]: PALETTE[index % len(PALETTE)] for index, lease in enumerate(scene.leases)}


def _running(node: str, pods: Iterable[Object]) -> frozenset[str]:
    """Devices of the node on which a miner runs."""
    return frozenset(
        pod["metadata"]["labels"][names.LABEL_DEVICE]
        for pod in pods
        if pod["spec"].get("nodeName") == node
        and names.LABEL_DEVICE in pod["metadata"].get("labels", {})
        and pod.get("status", {}).get("phase") == "Running"
        and "deletionTimestamp" not in pod["metadata"]
    )


# --- leases and the queue -----------------------------------------------------------------------------------------


def _leases(scene: Scene, colours: Mapping[str, str], width: int) -> Iterator[Text]:
    yield _rule(f"{'lease':<12}{'state':<22}{'GPUs':<13}{'ends in':>9}{'rate/h':>10}{'cost':>10}", width)
    costs = bill.by_lease(bill.lines(scene.records, scene.now))
    for lease in scene.leases:
        metadata = lease["metadata"]
        gone = metadata["uid"] in scene.gone
        state, style = _lease_state(lease, gone=gone)
        status = _lease_status(lease)
        rate = status.price.per_hour if status.price else ""
        line = Text.assemble((" ■ ", colours[metadata["uid"]]), (f"{metadata['name'][:11]:<12}", "bold"))
        line.append(f"{state:<22}", style).append(f"{_shape(lease):<13}")
        line.append(f"{'' if gone else _ends_in(status, scene.now):>9}{rate:>10}")
        cost = costs.get(metadata["name"])
        line.append(f"{'' if cost is None else f'{cost:f}':>10}", "bold")
        yield line.append(f"   {_message(status)}", "dim") if width >= ROOMY else line


def _shape(lease: Object) -> str:
    """What a lease is of: pods × GPUs."""
    spec = GpuLeaseSpec.model_validate(lease["spec"])
    pods = f"{spec.pods} × " if spec.pods > 1 else ""
    return f"{pods}{spec.gpus.count} whole" if spec.gpus.profile == FULL else f"{pods}{spec.gpus.profile}"


def _lease_state(lease: Object, *, gone: bool) -> tuple[str, str]:
    """The state in one word or two, and its style."""
    status = _lease_status(lease)
    conditions = {one.type: one for one in status.conditions}
    ready, expired = conditions.get(ConditionType.READY), conditions.get(ConditionType.EXPIRED)
    if gone:
        return "deleted", "dim"
    if "deletionTimestamp" in lease["metadata"]:
        return "being deleted", "yellow"
    if ready is None:
        return "new", "dim"
    if ready.status is ConditionStatus.TRUE:
        told = expired is not None and expired.reason is Reason.NOTICE_GIVEN
        return ("Ready, notice given", "bold yellow") if told else ("Ready", "bold green")
    if status.position:
        return f"{ready.reason}, number {status.position}", "yellow"
    return str(ready.reason), "dim" if status.ended else "yellow"


def _lease_status(lease: Object) -> GpuLeaseStatus:
    return GpuLeaseStatus.model_validate(lease.get("status") or {})


def _message(status: GpuLeaseStatus) -> str:
    """What a lease says of itself, unless the queue says it."""
    ready = next((one for one in status.conditions if one.type is ConditionType.READY), None)
    return ready.message if ready and status.position is None else ""


def _ends_in(status: GpuLeaseStatus, now: datetime) -> str:
    if status.expires_at is None or status.ended is not None:
        return ""
    minutes, seconds = divmod(max(0, int((status.expires_at - now).total_seconds())), 60)
    return f"{minutes}:{seconds:02d}"


def _queue(scene: Scene, width: int) -> Iterator[Text]:
    """Who waits, at which position, and why, in the operator's own words; two lines for each."""
    waiting = []
    for lease in scene.leases:
        status = _lease_status(lease)
        if status.position is not None and lease["metadata"]["uid"] not in scene.gone:
            ready = next(one for one in status.conditions if one.type is ConditionType.READY)
            waiting.append((status.position, lease["metadata"]["name"], ready.message))
    if waiting:
        yield _rule("queue", width)
    for position, name, message in sorted(waiting):
        reason = message.removeprefix(f"Position {position} in the queue: ")
        wrapped = textwrap.wrap(f" {position}  {name} {reason}", width, subsequent_indent="    ", max_lines=2)
        for line in map(Text, wrapped):
            line.highlight_words([f" {name} "], "bold")
            yield line


# --- the story ----------------------------------------------------------------------------------------------------


def _steps(scene: Scene, width: int, room: int) -> Iterator[Text]:
    """The steps that fit, those around the present one first."""
    steps = scene.steps
    if room < 2 or not steps:
        return
    done = sum(step.state is StepState.DONE for step in steps)
    yield _rule(f"step {min(done + 1, len(steps))} of {len(steps)}, {scene.elapsed:.1f} s", width)
    lines = [line for step in steps for line in _step(step)]
    reached = [index for index, step in enumerate(steps) if step.state is not StepState.AHEAD]
    present = sum(len(_step(step)) for step in steps[: reached[-1] + 1]) if reached else 1
    first = max(0, min(len(lines) - (room - 1), present - (room - 1)))
    yield from lines[first : first + room - 1]


def _step(step: Step) -> list[Text]:
    """A step in one line; the present one with what was typed and what it waits for."""
    seconds = "" if step.seconds is None else f"{step.seconds:5.1f} s "
    match step.state:
        case StepState.AHEAD:
            return [Text(f"   {step.title}", "dim")]
        case StepState.DONE:
            return [Text.assemble((" ✓ ", "bold green"), f"{seconds} {step.title}")]
        case StepState.NOW:
            return [
                Text.assemble((" ▶ ", "bold yellow"), f"{seconds} ", (step.title, "bold")),
                *([Text(f"   {step.note}", "cyan")] if step.note else []),
                *([Text(f"   waits for {step.awaits}", "dim")] if step.awaits else []),
            ]
        case StepState.FAILED:
            return [Text.assemble((" ✗ ", "bold red"), f"{seconds} ", (step.title, "bold red"))]


# --- lines --------------------------------------------------------------------------------------------------------


def _legend() -> Text:
    """What the colours mean. A lease's own colour stands before its name."""
    parts = [(" lease ", f"black on {PALETTE[0]}"), (" miner ", MINER), (" hand-over ", MOVING), (" faulty ", FAULTY)]
    text = Text(" ")
    for label, style in parts:
        text.append(label, style).append("  ")
    return text.append("idle ····", IDLE).append("   m: MIG mode, a bar is 8 memory slices", "dim")


def _rule(title: str, width: int) -> Text:
    line = Text(f" ─ {title} ", "dim")
    return line.append("─" * max(0, width - line.cell_len), "dim")


def _fitted(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    line.no_wrap = True
    return line
