"""Copies and neighbours are found without comparing all pairs, and what is found is what comparing all pairs finds."""

import re
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from deeptumornet.groups import FIELD, Joined, field, field_pairs, group, hashes, mark_copies, near_pairs
from deeptumornet.lungs import standardise
from deeptumornet.preprocessing import read_slice
from deeptumornet.study import StudyError

NONE = np.float32(np.nan)
SHARED = Path(__file__).resolve().parents[1].parent / "shared/data"


def no_fields(n: int) -> np.ndarray:
    return np.full((n, FIELD**2), NONE, np.float32)


def table_of(both: np.ndarray, patients="") -> pd.DataFrame:
    return pd.DataFrame({"image_id": [f"{k:012x}" for k in range(len(both))], "patient_id": patients,
                         "phash": [f"{h:016x}" for h in both[:, 0]], "dhash": [f"{h:016x}" for h in both[:, 1]]})


def differ(both: np.ndarray) -> np.ndarray:
    """Bits in which the two hashes of each pair of rows differ, the larger of the two: (n, n)."""
    return np.bitwise_count(both[:, None] ^ both[None]).max(2)


def partition(of) -> set[frozenset]:
    return {frozenset(part) for part in pd.Series(range(len(of))).groupby(np.asarray(of)).agg(list)}


def one_bit(rng, shape) -> np.ndarray:
    return np.uint64(1) << rng.integers(0, 64, shape).astype(np.uint64)


@st.composite
def families(draw, most=60):
    """Hashes of a few originals, their copies with up to seven bits flipped, some of them equal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    originals = rng.integers(0, 2**64, (draw(st.integers(1, 8)), 2), np.uint64)
    both = originals[rng.integers(len(originals), size=draw(st.integers(1, most)))]
    for _ in range(draw(st.integers(0, 7))):
        both = both ^ np.where(rng.random(both.shape) < 0.5, one_bit(rng, both.shape), np.uint64(0))
    return both


@settings(max_examples=150, deadline=None)
@given(families(), st.integers(0, 8))
def test_near_pairs_are_all_pairs(both, bits):
    rows, others = np.nonzero(np.triu(differ(both) <= bits, 1))
    blocks = near_pairs(both[:, 0], both[:, 1], bits)
    found = {tuple(sorted(pair)) for one, other in blocks for pair in zip(one.tolist(), other.tolist(), strict=True)}
    assert found == set(zip(rows.tolist(), others.tolist(), strict=True))


@settings(max_examples=150, deadline=None)
@given(families(), st.lists(st.sampled_from(["", "", "a", "b", "c"]), min_size=60, max_size=60))
def test_groups_of_hashes_and_patients_are_those_of_all_pairs(both, patients):
    patients = np.array(patients[:len(both)])
    same = (patients[:, None] == patients) & (patients != "")
    likely = (differ(both) <= 4) & ((patients == "")[:, None] | (patients == ""))
    expected = connected_components(coo_array(same | likely), directed=False)[1]
    assert partition(group(table_of(both, patients), 4, no_fields(len(both)), 0.75)) == partition(expected)


def made_fields(scans: int, slices: int, likeness: float, seed: int = 0) -> np.ndarray:
    """Scans of smooth random fields, each slice correlated by about `likeness` with the one before it."""
    rng = np.random.default_rng(seed)
    made = np.empty((scans, slices, FIELD * FIELD), np.float32)
    for k in range(slices):
        fresh = gaussian_filter(rng.standard_normal((scans, FIELD, FIELD), np.float32), (0, 1, 1)).reshape(scans, -1)
        fresh -= fresh.mean(1, keepdims=True)
        fresh /= np.linalg.norm(fresh, axis=1, keepdims=True)
        made[:, k] = fresh if k == 0 else likeness * made[:, k - 1] + np.sqrt(1 - likeness**2) * fresh
        made[:, k] /= np.linalg.norm(made[:, k], axis=1, keepdims=True)
    return made.reshape(-1, FIELD * FIELD)


def joined(fields, correlation, **how):
    together = Joined(len(fields))
    field_pairs(fields, correlation, together, np.full(len(fields), True), **how)
    return together.settle()


def linked(fields, correlation, component):
    """Of the pairs that correlate enough: which share a component."""
    rows, others = np.nonzero(np.triu(fields @ fields.T >= correlation, 1))
    return component[rows] == component[others]


def test_fields_compared_outright_are_those_of_all_pairs():
    fields = made_fields(150, 8, 0.85)
    fields[3] = np.nan
    expected = connected_components(coo_array(np.nan_to_num(fields) @ np.nan_to_num(fields).T >= 0.75), directed=False)[1]
    assert partition(joined(fields, 0.75)) == partition(expected)


def test_a_slice_of_unknown_patient_joins_its_neighbour_and_only_through_it_are_patients_joined():
    fields = made_fields(3, 4, 0.9)
    rng = np.random.default_rng(0)
    table = table_of(rng.integers(0, 2**64, (12, 2), np.uint64), [""] + ["a"] * 3 + ["b"] * 4 + ["c"] * 4)
    assert partition(group(table, 4, fields, 0.75)) == {frozenset(range(4)), frozenset(range(4, 8)), frozenset(range(8, 12))}
    table.loc[8, "patient_id"] = "b"
    assert group(table, 4, fields, 0.75)[8] == group(table, 4, fields, 0.75)[4] != group(table, 4, fields, 0.75)[9]


def test_a_near_copy_placed_with_its_patient_is_not_also_joined_to_whom_it_resembles():
    fields = np.repeat(made_fields(1, 1, 1), 3, axis=0)
    both = np.random.default_rng(0).integers(0, 2**64, (3, 2), np.uint64)
    both[2] = both[0] ^ np.uint64(5)
    assert partition(group(table_of(both, ["a", "b", ""]), 4, fields, 0.75)) == {frozenset({0, 2}), frozenset({1})}


def test_a_hundred_thousand_hashes():
    n = 100_000
    rng = np.random.default_rng(0)
    both = rng.integers(0, 2**64, (n, 2), np.uint64)
    family = np.arange(n)
    family[:10_000] = 0  # one hash in ten thousand files
    copies = np.arange(10_000, 40_000)
    family[copies] = copies - copies % 5
    both = both[family]
    for _ in range(2):
        both[copies] ^= np.where((family[copies] != copies)[:, None], one_bit(rng, (len(copies), 2)), np.uint64(0))
    table, fields = table_of(both), np.broadcast_to(NONE, (n, FIELD**2))
    start = time.perf_counter()
    found = group(table, 4, fields, 0.75)
    seconds = time.perf_counter() - start
    assert (found.to_numpy() == table["image_id"].to_numpy()[family]).all(), "every family, and nothing else"
    tracemalloc.start()
    group(table, 4, fields, 0.75)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    print(f"{n} hashes: {seconds:.1f} s, {peak:.0f} MB")
    assert seconds < 20 and peak < 400


def test_the_search_finds_what_comparing_all_pairs_finds():
    fields = made_fields(600, 10, 0.85)
    found, outright = joined(fields, 0.75, outright=0), joined(fields, 0.75, outright=len(fields))
    assert linked(fields, 0.75, outright).all()
    assert linked(fields, 0.75, found).mean() > 0.995
    assert len(set(outright)) <= len(set(found)) <= 1.01 * len(set(outright))
    assert all(len(set(outright[list(part)])) == 1 for part in partition(found)), "what is not alike is never joined"


def test_the_search_bears_ten_thousand_times_the_same_field():
    fields = made_fields(1, 1, 1).repeat(10_000, axis=0)
    start = time.perf_counter()
    assert len(set(joined(fields, 0.75, outright=0))) == 1
    assert time.perf_counter() - start < 30


# -- slices of people, where they are at hand ---------------------------------------------------------------------------


def _read(path: Path) -> dict:
    row = {"path": str(path), "label": path.parent.name, "image_id": "", "patient_id": "", "phash": "", "dhash": "",
           "field": np.full(FIELD**2, NONE, np.float32)}
    try:
        found = read_slice(path, path.name)
        row |= {"image_id": found.image_id, **dict(zip(("phash", "dhash"), hashes(found.pixels), strict=True))}
        row["field"] = field(standardise(found.pixels, 80)[0])
    except StudyError:
        pass
    return row


@pytest.fixture(scope="module")
def people() -> tuple[pd.DataFrame, np.ndarray]:
    folders = ("chest_ct_kaggle/Data/train/*/*", "iqothnccd_part/*/*", "tcia_lung_pet_ct_dx/*/*/*/*.dcm")
    files = sorted(path for folder in folders for path in SHARED.glob(folder))
    if not files:
        pytest.skip(f"{SHARED} is not here: it holds the slices of people that this measures on")
    with ProcessPoolExecutor(2) as pool:
        table = pd.DataFrame(pool.map(_read, files, chunksize=16))
    table["source"] = [Path(p).relative_to(SHARED).parts[0] for p in table["path"]]
    table["status"], table["reason"] = "kept", ""
    return table, np.stack(table.pop("field"))


CORRELATION = 0.75


def test_the_published_slices(people):
    table, fields = people
    kaggle = (table["source"] == "chest_ct_kaggle").to_numpy()
    marked = mark_copies(table[kaggle])
    marked["group"] = group(marked, 4, fields[kaggle], CORRELATION)
    two = marked[marked["label"].str.contains("adenocarcinoma|normal")]
    assert (len(two), two["image_id"].nunique()) == (343, 249)
    normal = marked[marked["label"] == "normal"]
    assert (len(normal), normal["image_id"].nunique()) == (148, 55) and normal["group"].nunique() <= 24
    torn = marked[marked["reason"].str.startswith("label conflict")]
    assert sorted(Path(p).name for p in torn["path"]) == ["l4.png", "sq2.png"]
    assert (marked.groupby("group")["image_id"].nunique() <= 0.1 * marked["image_id"].nunique()).all(), "no giant group"
    mixed = marked.groupby("group")["label"].agg(lambda labels: len({label == "normal" for label in labels}))
    assert (mixed == 1).all(), "no normal slice is in a group with a cancer"


def test_the_threshold_joins_neighbours_and_keeps_patients_apart(people):
    table, fields = people
    fields, table = fields[~table.duplicated("image_id")], table[~table.duplicated("image_id")].reset_index(drop=True)
    shown = np.isfinite(fields[:, 0])
    alike = np.where(shown[:, None] & shown, np.nan_to_num(fields) @ np.nan_to_num(fields).T, -1)
    both = np.array([[int(h, 16) for h in table[c]] for c in ("phash", "dhash")], np.uint64).T
    joins = (alike >= CORRELATION) | (differ(both) <= 4)
    one, other = np.triu_indices(len(table), 1)
    source, normal = table["source"].to_numpy(), table["label"].str.contains("normal", case=False).to_numpy()
    number = table["path"].map(lambda p: int(re.findall(r"\d+", Path(p).stem)[-1])).to_numpy()
    strangers = (source[one] != source[other]) | ((source[one] == "chest_ct_kaggle") & (normal[one] != normal[other]))
    next_to = (np.abs(number[one] - number[other]) == 1) & (normal[one] == normal[other]) & (source[one] == source[other])
    next_to &= shown[one] & shown[other]
    shares = {name: float(joins[one, other][next_to & (source[one] == name)].mean()) for name in ("tcia_lung_pet_ct_dx", "iqothnccd_part")}
    print(f"strangers joined: {joins[one, other][strangers].sum()} of {strangers.sum()}; neighbours joined: {shares}")
    assert joins[one, other][strangers].sum() <= 2
    assert shares["tcia_lung_pet_ct_dx"] > 0.6 and shares["iqothnccd_part"] > 0.75


def test_the_search_among_twenty_thousand(people):
    """The fields of people, hidden in made-up ones of the same mean and covariance."""
    _, fields = people
    fields = fields[np.isfinite(fields[:, 0])]
    rng = np.random.default_rng(0)
    _, spread, axes = np.linalg.svd(fields - fields.mean(0), full_matrices=False)
    made = fields.mean(0) + (rng.standard_normal((20_000, len(spread)), np.float32) * (spread / np.sqrt(len(fields)))) @ axes
    made -= made.mean(1, keepdims=True)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    at = rng.permutation(len(made))[:len(fields)]
    made[at] = fields
    start = time.perf_counter()
    found = joined(made.astype(np.float32), CORRELATION, outright=0)[at]
    print(f"20,000 fields: {time.perf_counter() - start:.1f} s, pairs joined {linked(fields, CORRELATION, found).mean():.4f}")
    assert linked(fields, CORRELATION, found).mean() > 0.99
