"""The files that golden/make.py wrote with other libraries."""

from __future__ import annotations

from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
ROWS = [[(7 * i + j * j) % 200 for j in range(1 + i % 6)] for i in range(40)]
# The prompt is the first half of each.
LABELS = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ROWS]
TEXTS = [" ".join("abcé"[token % 4] for token in row) for row in ROWS]
# Rows of a dataset that chooses them: some twice, some never, not in order.
CHOSEN = [39, 3, 3, 0, 17, 5, 21, 3, 20]
