"""A trace: what a row asks for, rows that ask for nothing named by their line, and foreign files through a mapping."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.api.lease import Tier
from gpu_tenancy.simulate.trace import EPOCH, HEADER, Complaint, Mapped, Request, Trace, by_line, parse, read

EXAMPLES: Final = Path(__file__).parents[3] / "examples" / "simulate"
TITLES: Final = "name,namespace,submitted,duration,gpus,profile,pods,tier,model,notice"


def requests(*rows: str, header: str = TITLES, **mapped: object) -> Trace:
    return parse([header, *rows], Mapped.model_validate(mapped))


def only(found: Trace) -> Request:
    assert found.complaints == ()
    [request] = found.requests
    return request


def test_the_header_of_the_documentation_is_that_of_the_code() -> None:
    assert TITLES.split(",") == list(HEADER)


def test_a_row_becomes_a_lease() -> None:
    found = only(requests("Train_1,Team A,90,1h30m,4,full,2,Spot,A100-SXM4-80GB,1m"))
    assert (found.line, found.name, found.namespace) == (2, "train-1", "team-a")
    assert found.submitted == EPOCH + timedelta(seconds=90)
    spec = found.spec
    assert (spec.gpus.profile, spec.gpus.count, spec.gpus.model, spec.pods) == ("full", 4, "A100-SXM4-80GB", 2)
    assert (spec.tier, spec.term.duration, spec.term.preemption_notice) == (Tier.SPOT, "5400s", "1m")


def test_a_row_may_say_no_more_than_when_and_how_many() -> None:
    found = only(requests("90,2", header="submitted,gpus"))
    assert (found.name, found.namespace) == ("job-2", "default")
    assert (found.spec.gpus.count, found.spec.tier, found.spec.term.duration) == (2, Tier.ON_DEMAND, None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("1.5", 1.5), ("2026-01-01T00:00:10Z", 10), ("2026-01-01 01:00:00+01:00", 0), ("2026-01-01", 0)],
)
def test_times_are_seconds_or_iso_8601_and_utc_where_they_say_no_zone(text: str, seconds: float) -> None:
    assert only(requests(f"{text},1", header="submitted,gpus")).submitted == EPOCH + timedelta(seconds=seconds)


@pytest.mark.parametrize(("text", "seconds"), [("0.2", 1), ("60", 60), ("60.1", 61), ("1h30m", 5400), ("36h", 129_600)])
def test_durations_are_seconds_or_durations_and_begun_seconds_count(text: str, seconds: int) -> None:
    assert only(requests(f"0,1,{text}", header="submitted,gpus,duration")).spec.term.duration == f"{seconds}s"


@pytest.mark.parametrize(
    ("gpus", "per_pod", "pods"), [("8", 8, 1), ("9", 3, 3), ("16", 8, 2), ("11", 1, 11), ("128", 8, 16)]
)
def test_more_gpus_than_a_pod_has_are_a_gang_of_as_few_equal_pods_as_there_can_be(
    gpus: str, per_pod: int, pods: int
) -> None:
    spec = only(requests(f"0,{gpus}", header="submitted,gpus")).spec
    assert (spec.gpus.count, spec.pods) == (per_pod, pods)


def test_several_slices_are_a_pod_each() -> None:
    spec = only(requests("0,3,2g.20gb", header="submitted,gpus,profile")).spec
    assert (spec.gpus.count, spec.pods) == (1, 3)


WRONG: Final = {
    "l,team,0,60,1": "it has 5 fields, and the header 10",
    "l,team,,60,1,,,,,": "submitted is empty",
    "l,team,soon,60,1,,,,,": 'submitted "soon" is no time; write 2026-01-31T12:00:00Z, or seconds',
    "l,team,-1,60,1,,,,,": 'submitted "-1" is no number of zero or more',
    "l,team,9e99,60,1,,,,,": 'submitted "9e99" is beyond all times',
    "l,team,0,60,,,,,,": "gpus is empty",
    "l,team,0,60,0,,,,,": "it asks for no GPU",
    "l,team,0,60,1.5,,,,,": 'gpus "1.5" is no whole number',
    "l,team,0,60,two,,,,,": 'gpus "two" is no number of zero or more',
    "l,team,0,60,nan,,,,,": 'gpus "nan" is no number of zero or more',
    "l,team,0,0,1,,,,,": "its duration is 0 s; it must be longer than zero, and no longer than ten years",
    "l,team,0,1e12,1,,,,,": "its duration is 1e+12 s; it must be longer than zero, and no longer than ten years",
    "l,team,0,long,1,,,,,": "long",
    "l,team,0,60,1,9g.90gb,,,,": 'profile "9g.90gb" is not known; there are full, 1g.5gb',
    "l,team,0,60,1,,0,,,": "pods: Input should be greater than or equal to 1",
    "l,team,0,60,1,,,Gold,,": 'tier "Gold" is not known; there are Reserved, OnDemand, Spot',
    "l,team,0,60,1,,,Spot,,soon": "soon",
    "l,团队,0,60,1,,,,,": '"团队" makes no name',
}


@pytest.mark.parametrize("row", WRONG)
def test_a_row_that_is_no_request_is_named_by_its_line_and_what_is_wrong_with_it(row: str) -> None:
    found = requests("first,team,0,60,1,,,,,", row, "last,team,0,60,1,,,,,")
    assert [one.name for one in found.requests] == ["first", "last"]
    [complaint] = found.complaints
    assert complaint.line == 3
    assert WRONG[row] in complaint.why
    [sentence] = by_line(found.complaints)
    assert sentence.startswith("line 3: ")


def test_two_rows_of_one_name_are_two_leases_in_two_namespaces_only() -> None:
    found = requests("l,a,0,60,1,,,,,", "l,b,0,60,1,,,,,", "l,a,0,60,1,,,,,")
    assert len(found.requests) == 2
    assert found.complaints == (Complaint(4, "lease a/l is there already; give each row its own name"),)


def test_the_line_is_that_of_the_file_where_fields_are_quoted_over_lines_and_lines_are_empty() -> None:
    text = f'{TITLES}\n"two\nlines",team,0,60,1,,,,,\n\nl,team,0,60,0,,,,,\n'
    found = parse(text.splitlines(keepends=True), Mapped())
    assert [one.name for one in found.requests] == ["two-lines"]
    assert [one.line for one in found.complaints] == [5]


FIELD: Final = st.one_of(
    st.sampled_from(
        ["", "0", "1", "8", "60", "-1", "full", "1g.10gb", "Spot", "x", "nan", "1h", "2026-01-01", "1e300"]
    ),
    st.text(st.characters(blacklist_characters='\r\n",', blacklist_categories=["Cs"]), max_size=6),
)


@given(st.lists(st.lists(FIELD, min_size=9, max_size=11), max_size=8))
def test_every_row_is_a_request_or_a_complaint(rows: list[list[str]]) -> None:
    lines = [",".join(row) for row in rows]
    found = requests(*lines)
    told = sorted([one.line for one in found.requests] + [one.line for one in found.complaints])
    assert told == [number + 2 for number, row in enumerate(rows) if any(row)]
    assert list(found.requests) == sorted(found.requests, key=lambda one: (one.submitted, one.line))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "the trace is empty; its first line names the columns: name, namespace, submitted"),
        (["start,gpus"], "the trace has no column submitted; it has start, gpus"),
        (["submitted,what"], "the trace has no column gpus; it has submitted, what"),
    ],
)
def test_what_is_no_trace_is_refused_as_a_whole(lines: Iterable[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(lines, Mapped())


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(b"submitted,gpus\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"trace\.csv is not CSV"):
        read(path)


def test_the_byte_order_mark_of_a_spreadsheet_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("submitted,gpus\n0,1\n", encoding="utf-8-sig")
    assert len(read(path).requests) == 1


# --- through a mapping ------------------------------------------------------------------------------------------------


def test_the_philly_trace_is_read_as_it_is() -> None:
    lines = ["timestamp,duration,num_gpus,gpu_time,cluster", "2017-10-09 07:01:55,66.0,16,66.0,11cb48"]
    found = only(parse(lines, Mapped.load(EXAMPLES / "philly.yaml")))
    assert found.submitted == datetime(2017, 10, 9, 7, 1, 55, tzinfo=UTC)
    assert (found.namespace, found.spec.term.duration) == ("11cb48", "66s")
    assert (found.spec.gpus.count, found.spec.pods) == (8, 2)


OPENB: Final = (
    "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time"
)


@pytest.mark.parametrize(
    ("gpus", "milli", "profile"),
    [
        (1, 50, "1g.10gb"), (1, 142, "1g.10gb"), (1, 143, "2g.20gb"), (1, 460, "4g.40gb"), (1, 999, "7g.80gb"),
        (1, 1000, "full"), (4, 1000, "full"),
    ],
)  # fmt: skip
def test_parts_of_a_gpu_of_the_openb_trace_become_the_slice_that_has_as_many_sevenths(
    gpus: int, milli: int, profile: str
) -> None:
    rows = f"openb-pod-0,6000,12288,{gpus},{milli},,BE,Running,427061,427161,427061"
    spec = only(parse([OPENB, rows], Mapped.load(EXAMPLES / "openb.yaml"))).spec
    assert (spec.gpus.profile, spec.gpus.count, spec.tier) == (profile, gpus, Tier.SPOT)
    assert spec.term.duration == "100s"


def test_pods_of_the_openb_trace_without_a_gpu_are_named() -> None:
    rows = "openb-pod-0,6000,12288,0,0,,LS,Running,0,10,0"
    found = parse([OPENB, rows], Mapped.load(EXAMPLES / "openb.yaml"))
    assert found == Trace((), (Complaint(2, "it asks for no GPU"),))


def test_units_delimiter_and_format_of_a_foreign_file() -> None:
    found = only(
        requests(
            "31.01.2026 12:00;90;1",
            header="when;minutes;gpus",
            delimiter=";",
            columns={"submitted": "when", "duration": "minutes", "gpus": "gpus"},
            units={"submitted": "time", "duration": "min"},
            timeFormat="%d.%m.%Y %H:%M",
            constants={"tier": "Spot", "namespace": "lab"},
        )
    )
    assert found.submitted == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert (found.namespace, found.spec.tier, found.spec.term.duration) == ("lab", Tier.SPOT, "5400s")


def test_a_lease_that_ended_before_it_was_asked_for_is_named() -> None:
    columns = {"submitted": "begin", "ended": "end", "gpus": "gpus"}
    found = requests("10,5,1", header="begin,end,gpus", columns=columns)
    assert [one.why for one in found.complaints] == [
        "its duration is -5 s; it must be longer than zero, and no longer than ten years"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("columns: [", "mapping.yaml is not YAML"),
        ("- a\n", "mapping.yaml is not a mapping: write `columns:`"),
        ("column: {}\n", "mapping.yaml: column: Extra inputs are not permitted"),
        ("units: {submitted: weeks}\n", "mapping.yaml: units.submitted: Input should be"),
        ("columns: {submited: t, gpus: n}\n", 'mapping.yaml: columns: a trace has no column "submited"'),
        ("constants: {teir: Spot}\n", 'mapping.yaml: constants: a trace has no column "teir"'),
        (
            "fractions: {column: m, profiles: [1g.10gb, 8g]}\n",
            'mapping.yaml: fractions.profiles: profile "8g" is not known',
        ),
    ],
)
def test_what_is_wrong_with_a_mapping_is_said_with_the_file_and_the_field(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mapping.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the sentence is compared below)
        Mapped.load(path)
    assert said in str(caught.value)


def test_a_mapping_that_names_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="the trace has no column jobid; it has submitted, gpus"):
        requests("0,1", header="submitted,gpus", columns={"submitted": "submitted", "gpus": "gpus", "name": "jobid"})
