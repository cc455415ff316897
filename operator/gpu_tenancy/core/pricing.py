"""Which PriceBook is in effect, and what a device costs under it. Pure; decimal strings in, decimal strings out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from gpu_tenancy.api.lease import Price, Tier
from gpu_tenancy.api.pricebook import PriceBookSpec, RateTier
from gpu_tenancy.core.snapshot import BookFacts


class Book(NamedTuple):
    """A readable PriceBook."""

    name: str
    created: datetime
    effective_from: datetime
    currency: str
    rates: Mapping[tuple[str, str, str], Price]
    """(model, profile, tier) → price of one device for an hour."""


@dataclass(frozen=True, slots=True)
class Pricing:
    """The price books as they stand at one instant."""

    current: Book | None
    """The book in effect; None: leases run unpriced if `exists` is False, and are refused otherwise."""
    exists: bool
    """There is some PriceBook, readable or not."""
    rivals: Mapping[str, tuple[str, ...]]
    """For each book that begins at the same instant as others, their names."""
    next_change: datetime | None
    """When another book takes effect."""

    def price(self, model: str, profile: str, tier: Tier) -> Price | None:
        """Price of one device for an hour at a tier, or None where the current book has no such rate."""
        if self.current is None:
            return None
        rates = self.current.rates
        return rates.get((model, profile, tier)) or rates.get((model, profile, RateTier.ANY))

    def allows(self, model: str, profile: str, tier: Tier) -> bool:
        """Whether a lease of that model, profile and tier may be admitted as far as prices go."""
        return not self.exists or self.price(model, profile, tier) is not None


def pricing(books: Sequence[BookFacts], now: datetime) -> Pricing:
    """In effect is the latest book that has begun. Books that share an instant annul each other, but for one that had
    begun before any other of those that exist was made: a twin made by mistake must not end the sale."""
    twins: dict[datetime, list[Book]] = defaultdict(list)
    for facts in books:
        if facts.spec is not None:
            twins[facts.spec.effective_from].append(_book(facts, facts.spec))
    valid = [survivor for group in twins.values() if (survivor := _survivor(group)) is not None]
    begun = [book for book in valid if book.effective_from <= now]
    return Pricing(
        current=max(begun, key=lambda book: book.effective_from, default=None),
        exists=bool(books),
        rivals={
            book.name: tuple(other.name for other in group if other is not book)
            for group in twins.values()
            if len(group) > 1
            for book in group
        },
        next_change=_earliest(book.effective_from for book in valid if book.effective_from > now),
    )


def _survivor(group: list[Book]) -> Book | None:
    """Of the books of one instant the one that counts, if any."""
    first, *others = sorted(group, key=lambda book: book.created)
    had_begun = all(max(first.created, first.effective_from) < other.created for other in others)
    return first if had_begun else None


def _book(facts: BookFacts, spec: PriceBookSpec) -> Book:
    rates = {
        (rate.model, rate.profile, str(rate.tier)): Price(
            per_hour=rate.per_hour, currency=spec.currency, book=facts.name
        )
        for rate in spec.rates
    }
    return Book(facts.name, facts.created, spec.effective_from, spec.currency, rates)


def _earliest(instants: Iterable[datetime]) -> datetime | None:
    return min(instants, default=None)
