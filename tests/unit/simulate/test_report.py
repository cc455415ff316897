"""The report: one page that asks nothing of any network, with every plot, of one run or two; names are not markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Final
from xml.etree import ElementTree as ET

import pytest

from gpu_tenancy.simulate import report
from gpu_tenancy.simulate.result import Result
from tests.unit.simulate.company import PRICES, company, outcome, trace

HEADINGS: Final = [
    "GPUs by state", "Leases that wait", "Waiting times by tier", "Waiting times by tenant", "Room", "Largest pod",
    "Pre-emptions and faults", "Money",
]  # fmt: skip


def some_result(**policies: object) -> Result:
    nodes = [{"name": "n", "gpus": 4, "mig": 2}]
    asked = trace(
        {"duration": 3600, "gpus": 2, "tier": "Spot"},
        {"submitted": 900, "gpus": 2},
        {"profile": "1g.10gb"},
        {"gpus": 9},
    )
    mining = {"perGpuHour": "0.10"}
    return outcome(company(nodes, priceBooks=[PRICES], mining=mining, policies=policies), asked)


def plots(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]  # noqa: S314  (our own)


def words(plot: ET.Element) -> set[str]:
    return {"".join(one.itertext()).strip() for one in plot.iter("{http://www.w3.org/2000/svg}text")}


class References(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, value) for name, value in attrs if name in {"src", "href", "xlink:href", "data", "action"}]


@pytest.fixture(scope="module")
def alone() -> str:
    """The page of one run: drawing takes a second."""
    return report.html(some_result())


@pytest.fixture(scope="module")
def beside() -> str:
    """The page of two."""
    return report.html(some_result(), some_result(mining=False))


@pytest.mark.parametrize("name", ["alone", "beside"])
def test_the_page_fetches_nothing_and_runs_nothing(request: pytest.FixtureRequest, name: str) -> None:
    page = request.getfixturevalue(name)
    references = References()
    references.feed(page)
    assert [one for one in references.found if not str(one[1]).startswith("#")] == []
    assert re.findall(r"url\((?!#)[^)]*\)|@import|<script|<link|<img|<iframe", page) == []
    namespaces = r'xmlns(:\w+)?="[^"]*"|PUBLIC "[^"]*"\s+"[^"]*"'
    assert re.findall(r"https?://[^\s\"<]+", re.sub(namespaces, "", page)) == []


def test_every_plot_is_there_with_a_heading_and_what_it_shows(alone: str) -> None:
    assert re.findall(r"<h2>(.*?)</h2>", alone) == HEADINGS
    drawn = plots(alone)
    assert len(drawn) == len(HEADINGS)
    assert {"GPUs", "days", "leased", "mining"} <= words(drawn[0])
    assert {"OnDemand", "Spot", "p50", "p99", "waited", "1 min"} <= words(drawn[2])
    assert {"namespace"} & words(drawn[3]) == set()
    assert {"OnDemand", "Spot", "mining", "USD"} <= words(drawn[7])


def test_every_axis_says_what_it_counts(alone: str) -> None:
    for plot in plots(alone):
        assert words(plot) & {"GPUs", "leases", "waited", "devices", "times", "USD"}


def test_the_tables_are_on_the_page_as_on_the_terminal(beside: str) -> None:
    assert "every slice in one hand" in beside
    assert "the other" in beside
    assert "line 5: " in beside


def test_a_title_is_text_and_no_markup() -> None:
    page = report.html(some_result().model_copy(update={"title": "<script>&"}))
    assert "<title>&lt;script&gt;&amp;" in page
    assert "<script" not in page


def test_the_same_result_makes_the_same_page(alone: str) -> None:
    assert report.html(some_result()) == alone


def test_a_result_without_anything_makes_a_page() -> None:
    assert len(plots(report.html(outcome(company(), trace())))) == len(HEADINGS)


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"--html needs matplotlib: pip install 'gpu-tenancy\[simulate\]'"):
        report.check()
