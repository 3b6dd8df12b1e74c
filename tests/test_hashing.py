from __future__ import annotations

import math

import pytest
import torch

from hf_trak.hashing import hash_file, hash_json, hash_tensors, random_bits, random_integers, random_signs, stream_key


def splitmix64(seed: int, n: int) -> int:
    """The n-th output, as Steele, Lea & Flood give it, in Python's unbounded integers; read as signed."""
    word = 2**64 - 1
    state = (seed + n * 0x9E3779B97F4A7C15) & word
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & word
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & word
    state ^= state >> 31
    return state - 2**64 if state >= 2**63 else state


def test_random_bits_are_splitmix64s_published_outputs():
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423 - 2**64,
        4593380528125082431,
        16408922859458223821 - 2**64,
    ]
    assert random_bits(1234567, torch.arange(1, 6)).tolist() == published


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), stream_key(3, "w", "rows")])
def test_random_bits_wrap_as_unsigned_arithmetic_does(key: int):
    counters = [0, 1, 2, 1023, 2**20, 2**40 + 7, 2**62 + 1]
    assert random_bits(key, torch.tensor(counters)).tolist() == [splitmix64(key, n) for n in counters]


def test_random_bits_are_pinned():
    assert stream_key(0, "w", "rows") == 1748368748795333150
    assert random_bits(0, torch.tensor([[0, 1], [2, 3]])).tolist() == [
        [0, -2152535657050944081],
        [7960286522194355700, 487617019471545679],
    ]


def test_stream_keys_differ_in_every_part_and_in_their_grouping():
    names = [
        (0,),
        (1,),
        ("0",),
        (0, "w"),
        ("w", 0),
        (0, "w", "rows"),
        (0, "wrows"),
        (0, "w", "rows", 0),
        ("a", "bc"),
        ("ab", "c"),
    ]
    assert len({stream_key(*parts) for parts in names}) == len(names)


def test_signs_are_balanced_and_uncorrelated_between_streams():
    n = 20_000
    signs = torch.stack([random_signs(stream_key(seed, "w"), n) for seed in range(8)])
    assert signs.abs().eq(1).all()
    gram = signs @ signs.T / n
    assert (gram - torch.eye(8)).abs().max() < 4.5 / math.sqrt(n)
    assert signs.mean(1).abs().max() < 4 / math.sqrt(n)
    # Neighbours in one stream are unrelated as well.
    for lag in (1, 2, 64):
        assert (signs[:, lag:] * signs[:, :-lag]).mean(1).abs().max() < 4 / math.sqrt(n - lag)


@pytest.mark.parametrize("below", [1, 2, 7, 64, 1000])
def test_integers_are_uniform_below_the_bound(below: int):
    n = 50_000
    counts = random_integers(stream_key("integers", below), n, below=below).bincount(minlength=below)
    assert len(counts) == below
    chi_square = ((counts - n / below) ** 2 / (n / below)).sum().item()
    assert chi_square < below - 1 + 4 * math.sqrt(2 * below)


def test_a_stream_may_be_drawn_in_pieces():
    whole = random_integers(5, 100, below=1000)
    pieces = torch.cat([random_integers(5, 30, below=1000), random_integers(5, 70, below=1000, start=30)])
    assert torch.equal(whole, pieces)


def test_the_hash_of_a_file_is_its_sha256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert hash_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"a" * 1_000_000)
    assert hash_file(path) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"


def test_the_hash_of_tensors_tells_names_dtypes_shapes_and_every_bit_apart():
    weight = torch.arange(6.0).reshape(2, 3)
    nudged = weight.clone()
    nudged[1, 2] = nudged[1, 2].nextafter(torch.tensor(100.0))
    variants = [
        {"w": weight},
        {"v": weight},
        {"w": weight.double()},
        {"w": weight.reshape(3, 2)},
        {"w": nudged},
        {"w": weight.bfloat16()},
        {"w": weight, "v": weight},
        {"v": weight, "w": weight},
        {"w": torch.tensor(1.0)},
        {"w": torch.tensor([True, False])},
    ]
    assert len({hash_tensors(tensors) for tensors in variants}) == len(variants)
    assert hash_tensors({"w": weight}) == hash_tensors({"w": weight.clone().requires_grad_()})
    assert hash_tensors({"w": weight.T}) == hash_tensors({"w": weight.T.contiguous()})


def test_the_hash_of_json_ignores_key_order_alone():
    assert hash_json({"a": 1, "b": [1, 2]}) == hash_json({"b": [1, 2], "a": 1})
    assert hash_json({"a": 1, "b": [1, 2]}) != hash_json({"a": 1, "b": [2, 1]})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_bits_are_the_same_on_cuda():
    counters = torch.arange(100_000) * 2**40 - 2**55
    assert torch.equal(random_bits(-7, counters), random_bits(-7, counters.cuda()).cpu())
