"""Public traces are read as they are through the mappings of the examples, and what the bench makes of one is sound."""

from __future__ import annotations

import lzma
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from gpu_tenancy.simulate.result import Conservation
from gpu_tenancy.simulate.trace import Mapped, parse
from tests.bench import simulate
from tests.bench.simulate import Lived, company, figures, lived, philly

ROOT: Final = Path(__file__).parents[3]


def test_the_philly_trace_is_read_to_its_last_row() -> None:
    found = philly()
    assert len(found.requests) == 82_247
    assert len({one.namespace for one in found.requests}) == 15
    assert max(one.spec.pods * one.spec.gpus.count for one in found.requests) == 128


def test_the_openb_trace_is_read_and_what_is_no_lease_is_named() -> None:
    with lzma.open(ROOT / "tests" / "data" / "openb_pod_list_default.csv.xz", "rt", newline="") as file:
        found = parse(file, Mapped.load(ROOT / "examples" / "simulate" / "openb.yaml"))
    assert (len(found.requests), len(found.complaints)) == (7_063, 1_089)
    why = Counter(one.why.split(";")[0] for one in found.complaints)
    assert why == {"it asks for no GPU": 1_088, "its duration is 0 s": 1}


def test_the_bench_says_what_its_figures_hold_for() -> None:
    first = philly(20)
    made = figures(lived(company(), first), lived(company(mines=False), first))
    assert [one.name for one in made] == [
        "simulate_philly_s", "idle_mined_pct", "mining_wait_p99_s", "philly_jain", "philly_jain_of_demand"
    ]  # fmt: skip
    assert [one.goal for one in made[:3] if "20 jobs, 871 GPUs" not in one.goal] == []
    assert made[1].median > 99.5
    assert made[2].median == pytest.approx(1.1)


def test_the_bench_has_no_figure_where_slices_are_missing() -> None:
    found = lived(company(), philly(3))
    missing = Conservation(slice_microseconds=9, by_state={}, leased_by_records=0)
    broken = Lived(found.result.model_copy(update={"conservation": missing}), 1.0)
    with pytest.raises(RuntimeError, match="slices are not conserved"):
        figures(broken, found)


def test_the_bench_is_not_run_on_a_trace_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.xz"
    path.write_bytes(lzma.compress(b"timestamp,duration,num_gpus,gpu_time,cluster\nsoon,1,1,1,a\n"))
    monkeypatch.setattr(simulate, "TRACE", path)
    with pytest.raises(RuntimeError, match=r"trace\.csv\.xz is not read as it is"):
        philly()
