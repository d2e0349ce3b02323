"""Which two responses to one prompt become a pair. Pure; what is left to chance is drawn by hashes, so that the same
prompt gives the same pair wherever and whenever it is worked out.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltaray.recipe.pairing import Draw, Pairing


@dataclass(frozen=True, slots=True)
class Offer:
    """A response that may become a side of a pair; `row` is its place in the table of all."""

    row: int
    teacher: str
    sample: int
    score: float


Pick = tuple[Offer, Offer]
"""(chosen, rejected)."""
Policy = Callable[[str, Sequence[Offer]], Pick | None]
"""(prompt id, the scored responses to it) -> the pair, or None if there are too few."""


def policy_of(pairing: Pairing) -> Policy:
    """The policy of a pairing that chooses from a pool."""
    choose = POLICIES[pairing.policy]

    def policy(prompt_id: str, offers: Sequence[Offer]) -> Pick | None:
        drawn = offers if pairing.draw is None else draw_offers(prompt_id, offers, pairing.draw)
        return choose(prompt_id, drawn) if len(drawn) > 1 else None

    return policy


def draw_offers(prompt_id: str, offers: Sequence[Offer], draw: Draw) -> list[Offer]:
    """One response each of `draw.of` teachers, exactly `draw.weak` of them weak; empty if there are too few."""
    one_each: dict[str, Offer] = {}
    for offer in sorted(offers, key=lambda offer: lot(prompt_id, offer, "draw")):
        one_each.setdefault(offer.teacher, offer)
    weak = [offer for offer in one_each.values() if offer.teacher in draw.weak_teachers][: draw.weak]
    strong = [offer for offer in one_each.values() if offer.teacher not in draw.weak_teachers][: draw.of - draw.weak]
    drawn = [*weak, *strong]
    return drawn if len(drawn) == draw.of else []


def best_over_worst(prompt_id: str, offers: Sequence[Offer]) -> Pick:
    """Largest difference; among equals the lot decides, so that no teacher is preferred for its place in a list."""
    ordered = sorted(offers, key=lambda offer: (offer.score, lot(prompt_id, offer, "tie")))
    return ordered[-1], ordered[0]


def best_over_random(prompt_id: str, offers: Sequence[Offer]) -> Pick:
    best, _ = best_over_worst(prompt_id, offers)
    others = (offer for offer in offers if offer.row != best.row)
    return best, min(others, key=lambda offer: lot(prompt_id, offer, "random"))


POLICIES: dict[str, Callable[[str, Sequence[Offer]], Pick]] = {
    "best_over_worst": best_over_worst,
    "best_over_random": best_over_random,
}
"""By the names that a recipe may use, besides `by_sample`, which is a join (`join.pick_by_sample`)."""


def lot(prompt_id: str, offer: Offer, purpose: str) -> bytes:
    """The place of a response in a random order, another one for each purpose."""
    return hashlib.blake2b(f"{purpose}#{prompt_id}#{offer.teacher}#{offer.sample}".encode(), digest_size=8).digest()
