"""Tokens of a wider dtype than the given one give a warning, and no others do."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from flat_files import write_datatrove
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mds import write as write_mds

from pdl_ext.corpus import TargetPolicy, count_corpus
from pdl_ext.corpus.reading.width import doubt_of_width
from pdl_ext.corpus.source import ReadOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*(cannot hold ids|its bytes then are ids)")

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64")


def zipf(vocab_size, number, seed=0):
    # Of a density of 1 / (id + 1), without a table of the vocabulary.
    return ((vocab_size + 1.0) ** np.random.default_rng(seed).random(number)).astype(np.int64) - 1


def width(dtype):
    return np.dtype(dtype).itemsize


def doubts(path, vocab_size, dtype, **options):
    """What is warned of a file's width."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count_corpus([path], vocab_size, dtype=dtype, **options)
    return [str(warning.message) for warning in caught if "its bytes then are ids" in str(warning.message)]


# Of a file's own dtype and of the one that is given, those that are narrower.
NARROWED = [(own, given) for own, given in itertools.product(DTYPES, DTYPES) if width(own) > width(given)]


@pytest.mark.parametrize(
    ("own", "given", "vocab_size"),
    [
        (own, given, vocab_size)
        for own, given in NARROWED
        for vocab_size in (200, 256, 5000, 32_000, 50_257, 128_256, 262_144)
        # Above, both bytes may be any; but that uint8 cannot hold the vocabulary is warned of.
        if width(own) > 2 or vocab_size <= 5000
    ],
)
def test_a_dtype_that_is_too_narrow(own, given, vocab_size, tmp_path):
    zipf(vocab_size, 3000).astype(own).tofile(tmp_path / "a.bin")
    (doubt,) = doubts(tmp_path / "a.bin", vocab_size, given)
    expected = {2: "uint16", 4: "uint32 or int32", 8: "int64"}[width(own)]
    times = width(own) // width(given)
    assert f"a.bin: got dtype {given}, expected {expected}: its bytes then" in doubt
    assert doubt.endswith(f"as {given}, {times - 1} of {times} ids would be 0")
    with pytest.raises(ValueError, match=rf"a\.bin: got dtype {given}, expected {expected}"):
        count_corpus([tmp_path / "a.bin"], vocab_size, dtype=given, strict=True)
    assert doubts(tmp_path / "a.bin", vocab_size, own) == []


@pytest.mark.parametrize(
    "change", ["ignored", "padded", "padded with -1", "padded with V", "few out of range", "zeros first"]
)
@pytest.mark.parametrize(
    ("own", "given"), [("int64", "int32"), ("int64", "uint16"), ("int32", "uint16"), ("int32", "uint8")]
)
def test_a_dtype_that_is_too_narrow_of_data_that_are_not_ids_alone(own, given, change, tmp_path):
    tokens = zipf(5000, 40_000).astype(own)
    generator = np.random.default_rng(1)
    if change == "ignored":
        tokens[generator.random(tokens.size) < 0.6] = -100
    elif change == "padded":
        tokens[np.arange(tokens.size) % 1000 > 100] = 0
    elif change == "padded with -1":
        tokens[np.arange(tokens.size) % 1000 > 100] = -1
    elif change == "padded with V":
        tokens[generator.random(tokens.size) < 0.3] = 5000
    elif change == "few out of range":
        tokens[generator.random(tokens.size) < 0.003] = 2**31 - 1
    else:
        tokens[: tokens.size // 2] = 0
    tokens.tofile(tmp_path / "a.bin")
    assert len(doubts(tmp_path / "a.bin", 5000, given)) == 1


def test_the_first_file_in_doubt_is_named_with_the_number_of_the_others(tmp_path):
    for seed in range(3):
        zipf(500, 400, seed).astype(np.uint32).tofile(tmp_path / f"{seed}.bin")
    zipf(500, 400).astype(np.uint16).tofile(tmp_path / "3.bin")
    (doubt,) = doubts(tmp_path, 500, "uint16")
    assert "0.bin: got dtype uint16" in doubt
    assert doubt.endswith("; 2 other files are in doubt, too")


def test_headerless_npy_and_ds_are_looked_at(tmp_path):
    (tmp_path / "a").mkdir()
    zipf(500, 400).astype(np.uint32).tofile(tmp_path / "a" / "part-0.npy")
    assert len(doubts(tmp_path / "a", 500, "uint16")) == 1
    path = write_datatrove(tmp_path, [zipf(500, 400).astype(np.uint32)])
    path.with_name(path.name + ".index").unlink()
    assert len(doubts(path, 500, "uint16")) == 1


@pytest.mark.parametrize(("own", "given"), [("int64", "int32"), ("int64", "uint16"), ("uint16", "uint8")])
def test_columns_of_bytes(own, given, tmp_path):
    rows = np.split(zipf(200, 6000).astype(own), np.arange(50, 6000, 50))
    samples = [{"tokens": row.tobytes()} for row in rows]
    folder = write_mds(tmp_path / "data", {"tokens": ("bytes", None)}, [samples[:60], samples[60:]])
    (doubt,) = doubts(folder, 200, given)
    assert f"shard.00000.mds: got dtype {given}, expected {own}" in doubt
    assert doubts(folder, 200, own) == []
    with pytest.raises(ValueError, match=rf"shard\.00000\.mds: got dtype {given}, expected {own}"):
        count_corpus([folder], 200, dtype=given, strict=True)
    # Of arrays the dtype is told, whatever they hold.
    array = [{"tokens": row.tobytes()} for row in np.zeros((9, 90), given)]
    folder = write_mds(tmp_path / "arrays", {"tokens": (f"ndarray:{given}:90", 90 * width(given))}, [array])
    assert doubts(folder, 200, None) == []


def test_a_file_that_tells_its_dtype_is_believed(tmp_path):
    np.save(tmp_path / "a.npy", zipf(500, 4000).astype(np.uint32).view(np.uint16))
    assert doubts(tmp_path / "a.npy", 500, "uint16") == []


def test_ids_of_which_every_second_one_is_0_cannot_be_told_from_wider_ones(tmp_path):
    tokens = zipf(500, 4000).astype(np.uint16) + np.uint16(1)
    tokens[1::2] = 0
    tokens.tofile(tmp_path / "a.bin")
    assert len(doubts(tmp_path / "a.bin", 502, "uint16")) == 1
    # An odd number of them are no wider ones.
    tokens[:-1].tofile(tmp_path / "a.bin")
    assert doubts(tmp_path / "a.bin", 502, "uint16") == []


# No false alarm: data of the dtype that is given, in which every second id is 0 more or less often.


def _padded(tokens, generator):
    rows = tokens[: tokens.size // 8 * 8].reshape(-1, 8).copy()
    rows[np.arange(8) >= generator.integers(0, 9, (len(rows), 1))] = 0
    return rows.ravel()


def _of_one_id_a_row(tokens, generator):
    # Of 8 bytes or fewer they would be wider ids to the last bit.
    rows = np.zeros((tokens.size, int(generator.choice([16, 24, 64]))), tokens.dtype)
    rows[:, 0] = tokens
    return rows.ravel()


def _alternating(tokens, generator):
    tokens = tokens.copy()
    tokens[1::2] = np.where(generator.random(tokens[1::2].size) < 0.9, 0, tokens[1::2])
    return tokens


def _sparse(tokens, generator):
    return np.where(generator.random(tokens.size) < 0.02, tokens, 0).astype(tokens.dtype)


def _padded_with_minus_one(tokens, generator):
    rows = tokens[: tokens.size // 8 * 8].reshape(-1, 8).copy()
    rows[generator.random(len(rows)) < 0.99] = -1
    return rows.ravel()


GENUINE = {
    "plain": lambda tokens, _: tokens,
    "zeros": lambda tokens, _: np.zeros_like(tokens),
    "ones": lambda tokens, _: np.ones_like(tokens),
    "padded": _padded,
    "padded with -1": lambda tokens, generator: (
        _padded_with_minus_one(tokens, generator) if tokens.dtype.kind == "i" else tokens
    ),
    "an id a row": _of_one_id_a_row,
    "alternating in nine of ten": _alternating,
    "sparse": _sparse,
    "runs": lambda tokens, generator: np.repeat(tokens, generator.integers(1, 5, tokens.size)),
    "short": lambda tokens, _: tokens[:31],
    "sorted": lambda tokens, _: np.sort(tokens),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GENUINE)
def test_genuine_data_are_not_in_doubt(name, dtype):
    for seed, vocab_size in itertools.product(range(20), (2, 3, 50, 256, 30_000, 65_536, 128_256, 2**24)):
        generator = np.random.default_rng(seed)
        high = min(vocab_size, np.iinfo(dtype).max + 1)
        tokens = GENUINE[name](zipf(high, 512, seed).astype(dtype), generator)
        blocks = [tokens.view(np.uint8)[:4096]]
        for ignore_index in (-100, -1, 0):
            options = ReadOptions(vocab_size, TargetPolicy(ignore_index=ignore_index))
            doubt = doubt_of_width("a", dtype, blocks, [tokens.nbytes], options)
            assert doubt is None, (seed, vocab_size, ignore_index)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_no_ids_drawn_independently_are_in_doubt(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    vocab_size = data.draw(st.sampled_from([2, 3, 10, 256, 1000, 50_257, 65_536, 128_256]))
    share_of_zeros = data.draw(st.floats(0, 1))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    tokens = generator.integers(0, min(vocab_size, np.iinfo(dtype).max + 1), 2048)
    tokens = np.where(generator.random(2048) < share_of_zeros, 0, tokens).astype(dtype)
    options = ReadOptions(vocab_size, TargetPolicy(ignore_index=data.draw(st.sampled_from([-100, -1, 0, 1]))))
    blocks = list(tokens.view(np.uint8).reshape(-1, 2048))
    assert doubt_of_width("a", dtype, blocks, [tokens.nbytes], options) is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_wide_ids_are_told_of_wherever_they_stand(data, tmp_path_factory):
    own, given_dtype = data.draw(st.sampled_from(NARROWED))
    vocab_size = data.draw(st.sampled_from([100, 1000] if width(own) == 2 else [100, 1000, 50_257, 128_256]))
    number = data.draw(st.integers(300, 30_000))
    path = tmp_path_factory.mktemp("wide") / "a.bin"
    zipf(vocab_size, number, data.draw(st.integers(0, 99))).astype(own).tofile(path)
    assert len(doubts(path, vocab_size, given_dtype)) == 1
