"""Which PriceBook is in effect, and what a device costs under it. Pure; decimal strings in, decimal strings out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from gpu_tenancy.api.lease import Price
from gpu_tenancy.api.pricebook import PriceBookSpec
from gpu_tenancy.core.snapshot import BookFacts


class Book(NamedTuple):
    """A readable PriceBook."""

    name: str
    effective_from: datetime
    currency: str
    rates: dict[tuple[str, str], Price]
    """(model, profile) → price of one device for an hour."""


@dataclass(frozen=True, slots=True)
class Pricing:
    """The price books as they stand at one instant."""

    current: Book | None
    """The book in effect; None: leases run unpriced if `exists` is False, and are refused otherwise."""
    exists: bool
    """There is some PriceBook, readable or not."""
    conflicting: frozenset[str]
    """Names of books that begin at the same instant as another: none of them takes effect."""
    next_change: datetime | None
    """When another book takes effect."""

    def price(self, model: str, profile: str) -> Price | None:
        """Price of one device for an hour, or None where the current book has no such rate."""
        return self.current.rates.get((model, profile)) if self.current else None

    def allows(self, model: str, profile: str) -> bool:
        """Whether a lease of that model and profile may be admitted as far as prices go."""
        return not self.exists or self.price(model, profile) is not None


def pricing(books: Sequence[BookFacts], now: datetime) -> Pricing:
    """In effect is the latest book that has begun; books that share an instant annul each other."""
    readable = [_book(book.name, book.spec) for book in books if book.spec is not None]
    instants = Counter(book.effective_from for book in readable)
    valid = [book for book in readable if instants[book.effective_from] == 1]
    begun = [book for book in valid if book.effective_from <= now]
    return Pricing(
        current=max(begun, key=lambda book: book.effective_from, default=None),
        exists=bool(books),
        conflicting=frozenset(book.name for book in readable if instants[book.effective_from] > 1),
        next_change=_earliest(book.effective_from for book in valid if book.effective_from > now),
    )


def _book(name: str, spec: PriceBookSpec) -> Book:
    rates = {
        (rate.model, rate.profile): Price(per_hour=rate.per_hour, currency=spec.currency, book=name)
        for rate in spec.rates
    }
    return Book(name, spec.effective_from, spec.currency, rates)


def _earliest(instants: Iterable[datetime]) -> datetime | None:
    return min(instants, default=None)
