"""The bill: UsageRecords as lines of money. Pure, in Decimal, and independent of the operator's own arithmetic.

A line is one segment of a lease; money is rounded once per line, half to even, to a hundredth.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Final

from rich.table import Table

from gpu_tenancy.api.usage import UsageRecordSpec
from tests.cluster.api import Object

CENT: Final = Decimal("0.01")
SECONDS_PER_HOUR: Final = 3600


@dataclass(frozen=True, slots=True)
class Line:
    """One segment of a lease."""

    contract: str
    """First UID of the lease, and number of the segment."""
    lease: str
    profile: str
    devices: int
    began: datetime
    ended: datetime | None
    """None while the segment is open."""
    seconds: int
    """Billed seconds, whole; of an open segment those so far."""
    rate: Decimal
    """Per device and hour; 0 for an unpriced lease."""
    currency: str

    @property
    def amount(self) -> Decimal:
        """What the segment costs, rounded once."""
        exact = self.rate * self.devices * self.seconds / SECONDS_PER_HOUR
        return exact.quantize(CENT, ROUND_HALF_EVEN)


def lines(records: Iterable[Object], now: datetime) -> list[Line]:
    """Lines of UsageRecords as the API server gives them, by the time they began."""
    found = [_line(UsageRecordSpec.model_validate(record["spec"]), now) for record in records]
    return sorted(found, key=lambda line: (line.began, line.lease))


def total(of: Iterable[Line]) -> Decimal:
    """Sum of the rounded lines."""
    return sum((line.amount for line in of), Decimal(0))


def by_lease(of: Iterable[Line]) -> Mapping[str, Decimal]:
    """Sum of the lines of each lease, by its name."""
    sums: dict[str, Decimal] = {}
    for line in of:
        sums[line.lease] = sums.get(line.lease, Decimal(0)) + line.amount
    return sums


def table(of: Sequence[Line]) -> Table:
    """The bill for people, with its total; × is the number of devices."""
    currency = of[0].currency if of else ""
    bill = Table(show_footer=True, box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=False)
    bill.add_column("contract", "total", no_wrap=True)
    bill.add_column("lease", no_wrap=True)
    bill.add_column("profile", no_wrap=True)
    for heading in ("×", "from", "to", "s", "per hour"):
        bill.add_column(heading, justify="right", no_wrap=True)
    bill.add_column(f"amount {currency}", f"{total(of):f}", justify="right", no_wrap=True)
    for line in of:
        ended = f"{line.ended:%H:%M:%S}" if line.ended else "open"
        bill.add_row(
            line.contract, line.lease, line.profile, str(line.devices), f"{line.began:%H:%M:%S}", ended,
            str(line.seconds), f"{line.rate:f}", f"{line.amount:f}",
        )  # fmt: skip
    return bill


def _line(spec: UsageRecordSpec, now: datetime) -> Line:
    end = spec.billable_to or now
    return Line(
        contract=f"{spec.contract[:8]}-{spec.segment}",
        lease=spec.lease_name,
        profile=spec.profile,
        devices=len(spec.devices),
        began=spec.billable_from,
        ended=spec.billable_to,
        seconds=max(0, int((end - spec.billable_from).total_seconds())),
        rate=Decimal(spec.price.per_hour) if spec.price else Decimal(0),
        currency=spec.price.currency if spec.price else "",
    )
