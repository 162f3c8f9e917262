"""Packing loses, repeats and reorders nothing, whatever the lengths, and documents begin where their marks are."""

import random

import numpy as np
import pytest

from ssa_pipelines import DataError, TokenizerError, doc_starts, pack
from ssa_pipelines.shards.packing import from_sample, mds_columns, to_sample
from tests.errors import raises

BOS, EOS = 1, 2


def rows_of(documents, row_length, vocab_size=50):
    return list(pack(documents, row_length, bos_id=BOS, eos_id=EOS, vocab_size=vocab_size))


def random_documents(seed, count=40, longest=60):
    draw = random.Random(seed)
    return [[draw.randrange(3, 50) for _ in range(draw.randrange(longest))] for _ in range(count)]


@pytest.mark.parametrize("row_length", [2, 3, 7, 16, 31, 64, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_rows_hold_the_documents_in_order_without_a_gap(row_length, seed):
    documents = random_documents(seed)
    rows = rows_of(documents, row_length)
    assert all(row.tokens.shape == (row_length,) for row in rows)
    assert all(row.padding == 0 for row in rows[:-1])
    assert 0 <= rows[-1].padding < row_length
    packed = np.concatenate([row.tokens for row in rows])[: len(rows) * row_length - rows[-1].padding]
    assert packed.tolist() == [token for d in documents for token in (BOS, *d, EOS)]


@pytest.mark.parametrize("row_length", [2, 3, 7, 16, 31, 64, 1000])
def test_a_document_begins_at_its_bos_and_again_at_each_row_it_continues_in(row_length):
    rows = rows_of(random_documents(9), row_length)
    for row in rows:
        real = row_length - row.padding
        begins = [i for i in range(real) if i == 0 or row.tokens[i] == BOS]
        assert row.starts.tolist() == begins + list(range(real, row_length))


@pytest.mark.parametrize("row_length", [2, 5, 77])
def test_each_padding_token_is_an_eos_and_a_separate_document(row_length):
    (*_, last) = rows_of([[5] * (row_length - 1)], row_length)  # one token too many for a row
    assert last.padding == row_length - 1
    assert last.tokens.tolist() == [EOS] * row_length
    assert doc_starts(last.starts, row_length).tolist() == list(range(row_length))


def test_document_starts_point_every_token_to_the_last_start_before_it():
    for row in rows_of(random_documents(3), 31):
        starts = doc_starts(row.starts, 31)
        assert starts.dtype == np.int32
        expected = [max(s for s in row.starts.tolist() if s <= i) for i in range(31)]
        assert starts.tolist() == expected


def test_documents_that_end_with_a_row_leave_no_padding_and_none_leave_no_row():
    rows = rows_of([[5] * 6, [6] * 6], 8)
    assert [row.padding for row in rows] == [0, 0]
    assert rows_of([], 8) == []
    assert [row.starts.tolist() for row in rows_of([[], [], []], 4)] == [[0, 2], [0, 2, 3]]


def test_the_smallest_type_that_holds_the_vocabulary_and_the_row_is_stored():
    assert rows_of([[65_535]], 3, vocab_size=65_536)[0].tokens.dtype == np.uint16
    assert rows_of([[65_536]], 3, vocab_size=65_537)[0].tokens.dtype == np.uint32
    assert mds_columns(65_536, 100)["starts"] == "ndarray:uint16"
    assert mds_columns(65_537, 100)["starts"] == "ndarray:uint32"


@pytest.mark.parametrize("token", [50, 70_000, -1])
def test_a_token_outside_the_vocabulary_is_refused(token):
    with raises(TokenizerError, "encoded-token-outside-vocabulary", token, "vocab_size 50"):
        rows_of([[3, token]], 8)


def test_a_row_of_one_token_is_refused():
    with raises(DataError, "row-length", "row_length 1"):
        rows_of([[3]], 1)


@pytest.mark.parametrize("column", ["tokens", "starts"])
def test_a_row_altered_by_one_bit_does_not_match_its_checksum(column):
    sample = to_sample(rows_of([[5] * 9, [6] * 9], 11)[0])
    from_sample(sample, row_length=11, vocab_size=50)
    sample[column] = sample[column].copy()
    sample[column][-1] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        from_sample(sample, row_length=11, vocab_size=50)


def test_a_row_of_another_length_or_vocabulary_is_refused():
    sample = to_sample(rows_of([[5] * 9, [49] * 9], 11)[1])
    with pytest.raises(ValueError, match="not a row of 12"):
        from_sample(sample, row_length=12, vocab_size=50)
    with pytest.raises(ValueError, match="vocab_size 49"):
        from_sample(sample, row_length=11, vocab_size=49)
