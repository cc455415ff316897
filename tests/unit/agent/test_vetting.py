"""What bars a GPU from serving, and what a reset would mend."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_tenancy.agent.gpus import Vitals
from gpu_tenancy.agent.situation import Counters
from gpu_tenancy.agent.vetting import asks_for_reset, objection

SOUND = Vitals(
    ecc_uncorrected=3,
    remap_pending=False,
    remap_failed=False,
    power_limit_mw=400_000,
    default_power_limit_mw=400_000,
    pcie_width=16,
    max_pcie_width=16,
)


def test_a_sound_gpu_and_one_that_tells_little_may_serve() -> None:
    assert objection(SOUND) is None
    assert objection(Vitals()) is None
    assert not asks_for_reset(SOUND)


@pytest.mark.parametrize(
    ("change", "sentence", "reset"),
    [
        ({"remap_failed": True}, "could not be remapped; exchange the GPU", False),
        ({"remap_pending": True}, "waits to be remapped; reset the GPU", True),
        ({"recovery_action": "reset the GPU"}, "the driver asks to reset the GPU", True),
        ({"recovery_action": "reboot the node"}, "the driver asks to reboot the node", False),
        ({"power_limit_mw": 250_000}, "its power limit is 250 W of 400 W", False),
        ({"pcie_width": 8}, "runs on 8 of 16 lanes; reseat the GPU", False),
    ],
)
def test_each_defect_bars_it_with_a_remedy(change: dict[str, object], sentence: str, reset: bool) -> None:
    vitals = replace(SOUND, **change)  # type: ignore[arg-type]  # each is of its field's type
    wrong = objection(vitals)
    assert wrong is not None
    assert sentence in wrong
    assert asks_for_reset(vitals) is reset


@pytest.mark.parametrize(
    ("before", "errors"),
    [
        (None, 0),
        (Counters(ecc_uncorrected=None), 0),
        (Counters(ecc_uncorrected=3), 0),
        (Counters(ecc_uncorrected=1), 2),
    ],
)
def test_memory_errors_since_the_last_hand_over_ask_for_a_reset(before: Counters | None, errors: int) -> None:
    wrong = objection(SOUND, before)
    assert asks_for_reset(SOUND, before) is bool(errors)
    assert wrong == (
        f"it has had {errors} uncorrectable memory errors since it was last examined; reset it" if errors else None
    )
