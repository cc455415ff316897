"""What the agent remembers across a kill: all of it or the state before, never half."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.agent import checkpoint
from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.memory import Memory
from gpu_tenancy.agent.situation import Held, Made, PreparedClaim, PreparedDevice, Situation
from gpu_tenancy.api.node import SlotState
from tests.fakes.clock import FakeClock
from tests.unit.agent.world import EPOCH, MIG_GPU, slot

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
slots = st.builds(slot, st.just(MIG_GPU), st.just("1g.10gb"), st.integers(0, 6), st.integers(1, 9))
held = st.builds(
    Held,
    slot=slots,
    state=st.sampled_from(SlotState),
    uuid=texts,
    ready_at=st.none() | st.just(EPOCH),
    message=texts,
    stored=st.booleans(),
    published=st.booleans(),
)
made = st.builds(Made, gpu=texts, profile=texts, start=st.integers(0, 7), uuid=texts)
devices = st.lists(st.builds(PreparedDevice, device=texts, requests=st.lists(texts, max_size=2)), max_size=3)
claims = st.builds(PreparedClaim, uid=texts, namespace=texts, name=texts, devices=devices, users=st.just(("a",)))
situations = st.builds(
    lambda helds, mades, claimed: Situation(
        held={one.slot.device: one for one in helds},
        made=frozenset(mades),
        prepared={one.uid: one for one in claimed},
    ),
    st.lists(held, max_size=4),
    st.lists(made, max_size=4),
    st.lists(claims, max_size=4),
)


@given(situations, texts)
def test_what_is_written_is_read_again(situation: Situation, boot_id: str) -> None:
    text = checkpoint.of(situation, boot_id).model_dump_json(by_alias=True, exclude_defaults=True)
    again = checkpoint.Checkpoint.model_validate_json(text)
    assert again.boot_id == boot_id
    assert checkpoint.situation_of(again) == situation


def test_an_agent_without_a_checkpoint_remembers_nothing(tmp_path: Path) -> None:
    assert checkpoint.read(tmp_path / "none.json") == checkpoint.Checkpoint()


@pytest.mark.parametrize("text", ["", "{", '{"version": 2}', '{"held": [{}]}', '{"surprise": 1}'])
def test_a_checkpoint_that_makes_no_sense_stops_the_agent_and_names_the_remedy(tmp_path: Path, text: str) -> None:
    path = tmp_path / "checkpoint.json"
    path.write_text(text)
    with pytest.raises(checkpoint.UnreadableCheckpoint, match=r"checkpoint\.json cannot be read: .* move the file"):
        checkpoint.read(path)


def test_a_write_that_dies_half_way_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.json"
    checkpoint.write(path, "{}")

    def dies(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(path, '{"bootId": "later"}')
    assert path.read_text() == "{}"


def test_one_agent_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "state" / "checkpoint.json"
    first = checkpoint.lock(path)
    assert first is not None
    assert checkpoint.lock(path) is None
    first.close()
    second = checkpoint.lock(path)
    assert second is not None
    second.close()


def test_everything_known_when_saved_is_called_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.json"

    async def learn_and_save(memory: Memory, number: int) -> None:
        memory.update(lambda now: known.accepted(now, slot(MIG_GPU, "1g.10gb", number, 1), EPOCH))
        await memory.saved()
        there = checkpoint.situation_of(checkpoint.read(path)).held
        assert slot(MIG_GPU, "1g.10gb", number, 1).device in there

    async def story() -> None:
        memory = Memory(path, "boot-1", Situation(), FakeClock())
        await asyncio.gather(*(learn_and_save(memory, number) for number in range(7)))
        assert checkpoint.read(path).boot_id == "boot-1"

    asyncio.run(story())
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint.json"]
