"""Where the images of a class lie in the files of a cache."""

from __future__ import annotations

import numpy as np

from dq.data.image_cache import Spans


def test_spans_are_sorted_by_class_and_then_by_file() -> None:
    rng = np.random.default_rng(0)
    labels = [np.sort(rng.integers(0, 7, n)) for n in (20, 1, 33, 0, 20)]
    labels = [x[x != 4] for x in labels]
    columns = [[c.astype(np.int32) for c in np.unique(x, return_index=True, return_counts=True)] for x in labels]
    spans = Spans.by_class(columns, 8)
    for label in range(8):
        own = spans.of(label)
        rows = list(zip(spans.part[own].tolist(), spans.first[own].tolist(), spans.number[own].tolist(), strict=True))
        expected = [
            (part, int(np.flatnonzero(x == label)[0]), int((x == label).sum()))
            for part, x in enumerate(labels)
            if (x == label).any()
        ]
        assert rows == expected
    assert spans.of(4).start == spans.of(4).stop
    assert {c.dtype for c in (spans.part, spans.first, spans.number)} == {np.dtype(np.int32)}
