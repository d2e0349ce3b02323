"""Which tokens of a packed row attend to which: as index lists for variable-length kernels, and as masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

WASTE = 1.5
"""A group of segments may compute so many times what its segments need; short ones are grouped anyhow."""

SMALL = 1 << 16
"""Attention weights of a group below which waste does not matter."""


@dataclass(frozen=True)
class Group:
    """Segments of similar size, padded to [n, Q] queries and [n, K] keys."""

    queries: Tensor  # int64 [n * Q]: places in the row
    keys: Tensor  # int64 [n * K]
    used: Tensor  # int64: which of the n * Q queries are none of the padding
    mask: Tensor  # bool [n, 1, Q, K]: true where a query attends
    size: tuple[int, int, int]  # n, Q, K


class Layout:
    """S segments whose queries follow each other in the row; a segment's last query attends to all of its keys.

    Query i of a segment with Q queries and K keys attends to its keys 0 … K - Q + i.
    """

    def __init__(self, queries: Sequence[int], keys: Sequence[int], places: Tensor) -> None:
        """
        Args:
            queries, keys: numbers of both, by segment.
            places: int64 [sum of keys]: where each segment's keys stand in the row, segment after segment; the last
                are its queries' own.
        """
        self.query_counts, self.key_counts, self.places = list(queries), list(keys), places
        self._groups: dict[int | None, list[Group]] = {}

    def to(self, device: torch.device | str) -> "Layout":
        return Layout(self.query_counts, self.key_counts, self.places.to(device))

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """int32 [S + 1] each: where the segments' queries and keys start and end."""
        counts = torch.tensor([[0, *self.query_counts], [0, *self.key_counts]], device=self.places.device)
        queries, keys = counts.cumsum(dim=1, dtype=torch.int32)
        return queries, keys

    @cached_property
    def order(self) -> Tensor:
        """int64 [T]: where each token of the row stands among the groups' used queries."""
        return torch.cat([group.queries[group.used] for group in self.groups(None)]).argsort()

    def groups(self, window: int | None) -> list[Group]:
        """The segments as padded batches with masks; `window`: the last so many keys only (sliding window)."""
        if window not in self._groups:
            starts = [bound.tolist() for bound in self.bounds]
            self._groups[window] = [self._group(segments, starts, window) for segments in self._similar()]
        return self._groups[window]

    def _similar(self) -> list[list[int]]:
        """Segments cut into lists of similar size, the largest first."""
        sizes = list(zip(self.key_counts, self.query_counts, strict=True))
        ranked = sorted(range(len(sizes)), key=lambda segment: sizes[segment], reverse=True)
        groups: list[list[int]] = []
        needed = longest = 0
        for segment in ranked:
            keys, queries = sizes[segment]
            longest = max(longest, queries)
            needed += keys * queries
            cost = (len(groups[-1]) + 1) * sizes[groups[-1][0]][0] * longest if groups else 0
            if groups and (cost <= WASTE * needed or cost <= SMALL):
                groups[-1].append(segment)
            else:
                groups.append([segment])
                longest, needed = queries, keys * queries
        return groups

    def _group(self, segments: list[int], starts: list[list[int]], window: int | None) -> Group:
        device = self.places.device
        counts = torch.tensor([(self.query_counts[s], self.key_counts[s]) for s in segments], device=device)
        at = torch.tensor([(starts[0][s], starts[1][s]) for s in segments], device=device)
        longest, widest = (int(most) for most in counts.amax(dim=0))
        query, key = torch.arange(longest, device=device), torch.arange(widest, device=device)
        real = query < counts[:, :1]
        last = (counts[:, 1:] - counts[:, :1] + query).clamp(max=widest - 1)  # the last key that a query may see
        mask = key <= last[:, :, None]
        if window is not None:
            mask &= key > last[:, :, None] - window
        # Padding queries see whatever a real one would: a row without any key would be NaN, and so its gradients.
        mask &= (key < counts[:, 1:])[:, None, :] | ~real[:, :, None]
        places = self.places[(at[:, 1:] + key.clamp(max=widest - 1)).clamp(max=len(self.places) - 1)]
        return Group(
            queries=(at[:, :1] + query.minimum(counts[:, :1] - 1)).flatten(),
            keys=places.flatten(),
            used=real.flatten().nonzero().flatten(),
            mask=mask[:, None],
            size=(len(segments), longest, widest),
        )
