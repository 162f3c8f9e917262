"""Cached attention on a CPU: what decode and prefill give a token is what attention over the whole sequence gives it.

The truth is the oracle, or the backend that other tests hold against it, in fp64. Caches are poisoned with NaN, so a
finite result has read nothing beyond a length.
"""

import pytest
import torch

import ssa_kernels
from ssa_kernels import BlockSpec, KernelArgumentError, KVCache, PagedKVCache, cached_attention, cached_blocks
from ssa_kernels.reference import oracle
from tests.errors import raises

from .cached import fill, last, make_cache, sequences, step, whole

BOTH = pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
MODES = ("full", "sparse")


@BOTH
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (16, 1)], ids=str)
def test_every_decoded_token_is_its_row_of_the_whole(paged, heads):
    spec, lengths = BlockSpec(16, 3), [1, 15, 16, 17, 100]
    data = sequences(lengths, *heads, 8)
    truth = {m: whole(data, spec, m) for m in MODES}
    for start in (0, 17):  # tokens of each sequence that arrive in one piece; the rest one by one
        cache = make_cache(paged, len(lengths), 112, heads[1], 8)
        fill(cache, data, [min(start, n) for n in lengths])
        for t in range(start, max(lengths)):
            alive = [t < n for n in lengths]
            q, k, v = (
                torch.cat([x[i][:, min(t, n - 1)][:, None] for x, n in zip(data, lengths, strict=True)])
                for i in range(3)
            )
            cache.append(k, v, [int(a) for a in alive])
            for mode in MODES:
                out = cached_attention(q, cache, spec, mode=mode)
                for b in (b for b, a in enumerate(alive) if a):
                    torch.testing.assert_close(out[b, 0], truth[mode][b][0, t], rtol=0, atol=1e-12)


def test_decode_equals_the_oracle():
    spec, scale = BlockSpec(4, 3), 0.3
    ((q, k, v),) = data = sequences([45], 4, 2, 8)
    blocks = oracle.select_blocks(q, k, spec, scale)
    truth = oracle.sparse_attention(q, k, v, spec, scale)
    cache = make_cache(False, 1, 48, 2, 8, block_size=4)
    for t in range(45):
        row = step(cache, data, 1)
        assert torch.equal(cached_blocks(row, cache, spec, scale=scale), blocks[:, t : t + 1])
        torch.testing.assert_close(cached_attention(row, cache, spec, scale=scale), truth[:, t : t + 1])


@BOTH
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 40])
def test_several_tokens_at_once_whatever_their_number(paged, mode, tokens):
    spec, lengths = BlockSpec(16, 2), [80, 61, 43]
    data = sequences(lengths, 4, 2, 8)
    truth = whole(data, spec, mode)
    cache = make_cache(paged, 3, 96, 2, 8)
    fill(cache, data, [n - tokens for n in lengths])
    out = cached_attention(step(cache, data, tokens), cache, spec, mode=mode)
    for b in range(3):
        torch.testing.assert_close(out[b], truth[b][0, -tokens:], rtol=0, atol=1e-12)


@BOTH
@pytest.mark.parametrize("mode", MODES)
def test_left_padding_never_enters_the_cache(paged, mode):
    spec, lengths = BlockSpec(16, 2), [50, 20, 7]
    data = sequences(lengths, 4, 2, 8)
    cache = make_cache(paged, 3, 64, 2, 8)
    fill(cache, data, lengths)
    assert cache.host_lengths == cache.lengths.tolist() == lengths
    for tokens in (50, 16):
        q = torch.cat([last(x[0], tokens) for x in data])
        out = cached_attention(q, cache, spec, mode=mode)
        for b, row in enumerate(whole(data, spec, mode)):
            torch.testing.assert_close(out[b : b + 1], last(row, tokens), rtol=0, atol=1e-12)


def test_the_budget_may_change_from_call_to_call():
    data = sequences([90], 4, 2, 8)
    cache = make_cache(False, 1, 96, 2, 8)
    fill(cache, data, [89])
    q = step(cache, data, 1)
    for count in (1, 2, 4, 5, 6, 200):
        truth = whole(data, BlockSpec(16, count), "sparse")[0][:, -1:]
        torch.testing.assert_close(cached_attention(q, cache, BlockSpec(16, count)), truth)


def test_the_authors_selection_decodes():
    spec = BlockSpec(16, 16, "reference")
    data = sequences([523], 4, 1, 8)
    cache = make_cache(False, 1, 523, 1, 8)
    fill(cache, data, [519])
    q = step(cache, data, 4)
    index = torch.arange(519, 523, dtype=torch.int32)
    assert torch.equal(cached_blocks(q, cache, spec), ssa_kernels.select_blocks(q, data[0][1], spec, query_index=index))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cached_means_keep_the_precision_selection_needs(dtype):
    data = sequences([64], 2, 2, 16, dtype=dtype)
    cache = make_cache(False, 1, 64, 2, 16, dtype=dtype)
    fill(cache, data, [64])
    mean = data[0][1].double().unflatten(1, (4, 16)).mean(2)
    got = cache.pooled.double().sum(-2)
    assert (got - mean[0]).abs().max() <= 2e-5 * mean.abs().max()


def test_beams_reorder_crop_and_grow():
    spec, lengths = BlockSpec(16, 2), [40, 50]
    data = sequences(lengths, 4, 2, 8)
    cache = make_cache(False, 2, 50, 2, 8)
    fill(cache, data, lengths)
    cache.reorder(torch.tensor([1, 1]))
    cache.crop([33, 20])
    cache.grow(70)
    other = sequences([60, 60], 4, 2, 8, seed=1)
    mixed = [
        tuple(torch.cat([data[1][i][:, :n], other[b][i][:, n:]], 1) for i in range(3)) for b, n in enumerate([33, 20])
    ]
    fill(cache, mixed, [59, 59])
    out = cached_attention(step(cache, mixed, 1), cache, spec)
    for b in range(2):
        torch.testing.assert_close(out[b], whole(mixed, spec, "sparse")[b][0, -1:])


def test_pages_of_a_shared_prefix_bring_their_pooled_keys():
    spec = BlockSpec(16, 2)
    (first,) = sequences([70], 4, 2, 8)
    (other,) = sequences([70], 4, 2, 8, seed=1)
    second = tuple(torch.cat([a[:, :64], b[:, 64:]], 1) for a, b in zip(first, other, strict=True))
    cache = PagedKVCache(3, 12, 32, 3, 2, 8, dtype=torch.float64)
    cache.assign(0, [7, 2, 9])
    k, v = (torch.cat([x, x * 0, x * 0]) for x in first[1:])
    cache.append(k, v, [70, 0, 0])
    cache.assign(2, [7, 2, 4], length=64)
    k, v = (torch.cat([x[:, 64:] * 0, x[:, 64:] * 0, x[:, 64:]]) for x in second[1:])
    cache.append(k, v, [0, 0, 6])
    assert cache.host_lengths == [70, -1, 70]
    out = cached_attention(torch.cat([first[0][:, -6:], first[0][:, -6:], second[0][:, -6:]]), cache, spec)
    truth = whole([first, second], spec, "sparse")
    torch.testing.assert_close(out[0], truth[0][0, -6:])
    torch.testing.assert_close(out[2], truth[1][0, -6:])
    assert not out[1].any()  # idle


def test_a_full_cache_refuses_and_stays_as_it_was():
    for paged in (False, True):
        cache = make_cache(paged, 2, 32, 2, 8, page=16)
        data = sequences([40, 40], 4, 2, 8)
        fill(cache, data, [31, 20])
        kept = cache.keys.clone(), cache.lengths.clone()
        with raises(KernelArgumentError, "k.shape", "k.shape[1]", "sequence 0"):
            step(cache, data, 2)
        assert cache.host_lengths == [31, 20]
        torch.testing.assert_close((cache.keys, cache.lengths), kept, equal_nan=True)
        step(cache, data, 1)


WRONG = [
    ("q.dtype", {"q": torch.zeros(2, 1, 4, 8, dtype=torch.float16)}),
    ("q.shape[0]", {"q": torch.zeros(1, 1, 4, 8)}),
    ("q.shape[2] (Hq)", {"q": torch.zeros(2, 1, 3, 8)}),
    ("q.shape[3]", {"q": torch.zeros(2, 1, 4, 16)}),
    ("q.shape", {"q": torch.zeros(2, 4, 8)}),
    ("q.device", {"q": torch.zeros(2, 1, 4, 8, device="meta")}),
    ("cache", {"cache": None}),
    ("spec", {"spec": None}),
    ("spec.block_size", {"spec": BlockSpec(32, 2)}),
    ("spec.block_count", {"spec": BlockSpec(16, 0)}),
    ("mode", {"mode": "dense"}),
    ("scale", {"scale": 0.0}),
    ("backend", {"backend": "triton"}),
]


@pytest.mark.parametrize(("name", "change"), WRONG, ids=[name for name, _ in WRONG])
def test_a_wrong_argument_is_named(name, change):
    cache = KVCache(2, 32, 2, 8, dtype=torch.float32)
    arguments = {"q": torch.zeros(2, 1, 4, 8), "cache": cache, "spec": BlockSpec(16, 2)} | change
    with pytest.raises(KernelArgumentError) as caught:
        cached_attention(**arguments)
    assert str(caught.value).startswith(name + ":")


def test_wrong_caches_and_appends_are_named():
    k = torch.zeros(2, 3, 2, 8)
    cache = KVCache(2, 32, 2, 8, dtype=torch.float32)
    paged = PagedKVCache(2, 4, 16, 2, 2, 8)
    mistakes = [
        ("capacity", lambda: KVCache(2, 0, 2, 8)),
        ("block_size", lambda: KVCache(2, 32, 2, 8, block_size=0)),
        ("dtype", lambda: KVCache(2, 32, 2, 8, dtype=torch.int32)),
        ("page_size", lambda: PagedKVCache(2, 4, 24, 2, 2, 8)),
        ("page_size", lambda: PagedKVCache(2, 4, 16, 2, 2, 8, block_size=64)),
        ("k.shape", lambda: cache.append(k[:1], k)),
        ("k.dtype", lambda: cache.append(k.half(), k)),
        ("v.shape", lambda: cache.append(k, k[:, :2])),
        ("counts", lambda: cache.append(k, k, [1, 4])),
        ("counts", lambda: cache.append(k, k, [1, True])),
        ("backend", lambda: cache.append(k, k, [1, 1], backend="cuda")),
        ("lengths", lambda: cache.crop([1, 0])),
        ("tokens", lambda: cache.reserve(-1)),
        ("tokens", lambda: cache.reserve([1])),
        ("tokens", lambda: cache.reserve(1.5)),
        ("sequences", lambda: cache.reorder([0, 1])),
        ("sequences", lambda: cache.reorder(torch.tensor([0, 2]))),
        ("sequences", lambda: cache.reorder(torch.tensor([-1, 0]))),
        ("sequences.dtype", lambda: cache.reorder(torch.tensor([0.0, 1.0]))),
        ("sequences.shape", lambda: cache.reorder(torch.tensor([0]))),
        ("batch", lambda: KVCache(True, 32, 2, 8)),
        ("sequence", lambda: paged.assign(2, [0])),
        ("pages", lambda: paged.assign(0, [0, 0])),
        ("pages", lambda: paged.assign(0, [0, 1, 2])),
        ("pages", lambda: paged.assign(0, [4])),
        ("length", lambda: paged.assign(0, [0], length=17)),
    ]
    for name, mistake in mistakes:
        with pytest.raises(KernelArgumentError) as caught:
            mistake()
        assert caught.value.args[0] == name


def test_a_cache_keeps_no_graph_of_what_it_is_given():
    """Outside `no_grad` every step's graph would stay, through the storage, as long as the cache."""
    k = torch.randn(2, 20, 2, 8, requires_grad=True)
    for cache in (KVCache(2, 64, 2, 8, dtype=torch.float32), make_cache(True, 2, 64, 2, 8, dtype=torch.float32)):
        cache.append(k, k)
        cache.append(k[:, :1], k[:, :1])
        assert not any(x.requires_grad for x in (cache.keys, cache.values, cache.pooled))
        assert cache.host_lengths == [21, 21]
