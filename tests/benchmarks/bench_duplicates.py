"""Near copies and neighbours among 100,000 slices: seconds and memory against 10,000."""

import sys

import numpy as np
import pandas as pd
from benchmark import peak, peak_of, save, seconds

from deeptumornet.groups import FIELD, group

SCAN, FLIPS = 100, 8


def slices(count: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Hashes and lung fields of `count` slices in scans of SCAN, each FLIPS of 64 bits from its scan's; each tenth slice is
    a near copy of the one before it."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, (2, -(-count // SCAN)), dtype=np.uint64).repeat(SCAN, axis=1)[:, :count]
    bits = rng.permuted(np.tile(np.arange(64, dtype=np.uint64), (2, count, 1)), axis=2)[..., :FLIPS]
    hashes ^= np.bitwise_or.reduce(np.uint64(1) << bits, axis=2)
    hashes[:, 9::10] = hashes[:, 8::10] ^ np.uint64(5)
    fields = rng.normal(size=(count, FIELD**2)).astype(np.float32)
    fields -= fields.mean(1, keepdims=True)
    fields /= np.linalg.norm(fields, axis=1, keepdims=True)
    rows = {"image_id": [f"{k:064x}" for k in range(count)], "patient_id": "", "phash": [f"{h:016x}" for h in hashes[0]],
            "dhash": [f"{h:016x}" for h in hashes[1]]}
    return pd.DataFrame(rows), fields


def grouped(count: int) -> None:
    table, fields = slices(count)
    found = group(table, 4, fields, 0.75)
    assert found.nunique() == count - count // 10, f"{found.nunique()} groups of {count} slices"


if __name__ == "__main__":
    if len(sys.argv) == 2:
        grouped(int(sys.argv[1]))
        print(peak())
        sys.exit()
    times = [(seconds(lambda: grouped(10_000)), seconds(lambda: grouped(100_000))) for _ in range(3)]
    save("grouping_seconds", [many / (10 * few) for few, many in times], "at most 2 (1 is linear, 10 all pairs)",
         f"seconds to group 100,000 generated hashes, in scans of {SCAN} that are {FLIPS} bits from their centre, and lung fields by ten "
         "times those for 10,000", seconds=times)
    few, many = peak_of(__file__, 10_000), peak_of(__file__, 100_000)
    save("grouping_memory", [many / few], "at most 10", "peak resident memory at 100,000 slices by that at 10,000, the data included",
         mb=[few, many])
