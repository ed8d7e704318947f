from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcls import fingerprints


def test_a_flipped_bit_in_an_array_is_noticed_whichever_it_is():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    original, seen = fingerprints.fingerprint(jnp.asarray(array)), set()
    for place in range(12):
        for bit in range(0, 32, 5):
            flipped = array.copy()
            flipped.view(np.uint32).flat[place] ^= np.uint32(1 << bit)
            seen.add(fingerprints.fingerprint(jnp.asarray(flipped)))
    assert original not in seen and len(seen) == 12 * 7
    assert fingerprints.fingerprint(jnp.asarray(array[::-1])) != original


def murmur(value: int) -> int:
    value = (value ^ (value >> 16)) * 0x85EBCA6B % 2**32
    value = (value ^ (value >> 13)) * 0xC2B2AE35 % 2**32
    return value ^ (value >> 16)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8', 'bool', 'uint32'])
@pytest.mark.parametrize('shape', [(), (0,), (7,), (3, 4, 5)])
def test_it_is_the_sum_that_it_is_said_to_be(dtype, shape):
    array = jnp.asarray(np.random.default_rng(0).integers(0, 2, shape), dtype)
    words = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    bits = np.asarray(array).reshape(-1).view(words).tolist()
    mixed = (murmur(b ^ murmur((i + 0x9E3779B9) % 2**32)) for i, b in enumerate(bits))
    assert fingerprints.fingerprint(array) == sum(mixed) % 2**32


def test_it_does_not_depend_on_the_size_of_the_pieces(monkeypatch):
    array = jnp.arange(1000.0)
    whole = fingerprints.fingerprint(array)
    monkeypatch.setattr(fingerprints, '_CHUNK', 7)
    assert fingerprints.fingerprint(array) == whole


@pytest.mark.parametrize('spec', [('a',), (None, 'a'), ('b', 'a'), (('a', 'b'),), ()])
def test_the_parts_that_processes_hold_add_up_to_the_whole(spec):
    array = jnp.arange(8 * 16 * 3.0).reshape(8, 16, 3)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('a', 'b'))
    split = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    processes = [
        SimpleNamespace(
            is_fully_addressable=False,
            is_fully_replicated=False,
            shape=array.shape,
            addressable_shards=split.addressable_shards[part],
        )
        for part in (slice(0, 3), slice(3, None))
    ]
    parts = sum(map(fingerprints.fingerprint, processes)) % 2**32
    assert parts == fingerprints.fingerprint(split) == fingerprints.fingerprint(array)
