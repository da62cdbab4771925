from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_runtime.package.manifest import SliceSpec, TensorSpec
from edge_runtime.protocol.messages import Directions, Task
from edge_runtime.training.philox import words_at
from edge_runtime.training.tangents import (
    GRAIN,
    draw_tangents,
    hadamard_rows,
    normals,
    philox_key,
    random_words,
    signs,
    stride_over,
)
from tests.edge_runtime.golden.tangents import EXAMPLES, FILE, SPECS, STEP, TASK, recording

MASK = 2**64 - 1


def philox_4x64_10(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox 4x64 with ten rounds, in Python integers (Salmon et al. 2011, section 3.3 and table 2)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & MASK, (p0 >> 64) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return c0, c1, c2, c3


def words_of(key: tuple[int, int], step: int, example: int, draw: int, count: int) -> list[int]:
    """The words the module documents: counter (block, draw, example, step), blocks from 1."""
    blocks = -(-count // 4)
    return [w for b in range(1, blocks + 1) for w in philox_4x64_10((b, draw, example, step), key)][:count]


def key_of(seed: int, round_number: int, slot: int, name: str) -> tuple[int, int]:
    digest = hashlib.sha256(
        b"edge tangents 1" + struct.pack("<QQQ", seed, round_number, slot) + name.encode()
    )
    return struct.unpack("<QQ", digest.digest()[:16])


# Known-answer vectors of Random123 1.14 (tests/kat_vectors, lines "philox4x64 10").
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (MASK, MASK, MASK, MASK),
        (MASK, MASK),
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_independent_generator_knows_the_published_answers(counter, key, answer) -> None:
    """The tests' own Philox reproduces the known-answer vectors of its inventors."""
    assert philox_4x64_10(counter, key) == answer


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**63 - 1),
    numbers=st.tuples(*[st.integers(0, 2**40)] * 4),
    draw=st.integers(0, 2**31),
    name=st.text("abc.0_-", min_size=1, max_size=12),
    count=st.integers(1, 9),
)
def test_words_come_from_the_documented_counter_and_key(seed, numbers, draw, name, count) -> None:
    """Key and words equal those of an independent Philox in Python integers, for any address."""
    round_number, slot, step, example = numbers
    key = philox_key(seed, round_number, slot, name)
    assert tuple(int(word) for word in key) == key_of(seed, round_number, slot, name)
    words = random_words(key, step, example, draw, count)
    assert [int(word) for word in words] == words_of(tuple(map(int, key)), step, example, draw, count)


def test_bits_never_change() -> None:
    """The recorded signs of every kind of directions are reproduced bit for bit."""
    assert recording() == json.loads(FILE.read_text())


def test_recorded_bits_come_from_an_independent_generator() -> None:
    """Bit j of word w is entry 64w + j of a slice, its tensors in order; a set bit is +1."""
    recorded = json.loads(FILE.read_text())["per_example"]
    for spec in SPECS:
        key = key_of(TASK.seed, TASK.round, TASK.slot, spec.name)
        names = [f"{spec.name}/{tensor.name}" for tensor in spec.tensors]
        expected = dict.fromkeys(names, "")
        for draw in range(TASK.draws):
            for example in EXAMPLES:
                words = words_of(key, STEP, example, draw, -(-spec.dimensions // 64))
                bits = "".join(str(word >> j & 1) for word in words for j in range(64))
                for name, tensor in zip(names, spec.tensors, strict=True):
                    count = int(np.prod(tensor.shape))
                    expected[name] += bits[:count]
                    bits = bits[count:]
        assert {name: recorded[name] for name in names} == expected


def test_recorded_decks_come_from_an_independent_dealer() -> None:
    """Turn by turn, each slice's next row of a Hadamard matrix is written down in Python integers, from the key alone.

    Row r has -1 in column c where r and c share an odd number of bits. A deck's rows go by the size of its order words;
    its columns' signs are bits of its sign words; neither knows the slot.
    """
    recorded = json.loads(FILE.read_text())["dealt"]
    names = [spec.name for spec in SPECS]
    start = words_of(key_of(TASK.seed, TASK.round, 0, "deck/" + "/".join(names)), 0, 0, 0, 1)[0] % 2
    made: dict[str, str] = dict.fromkeys(recorded, "")
    for step in range(TASK.steps):
        turns = [
            ((TASK.slot * TASK.steps + step) * TASK.batch_size + example) * 8 + draw
            for draw in range(8)
            for example in EXAMPLES
        ]
        for number, spec in enumerate(SPECS):
            key = key_of(TASK.seed, TASK.round, 0, f"deck/{spec.name}")
            order, size = {16: (16, 16), 81: (128, 81)}[spec.dimensions]
            rows = []
            for turn in turns:
                deck, place = divmod(turn // 2, order)
                shuffled = words_of(key, 0, deck, 2, order)
                row = sorted(range(order), key=lambda index, words=shuffled: words[index])[place]
                column = words_of(key, 0, deck, 1, -(-size // 64))
                entries = [
                    (column[c // 64] >> (c % 64) & 1) ^ (bin(row & c).count("1") & 1) for c in range(size)
                ]
                rows.append(
                    "".join("-+"[entry] for entry in entries)
                    if (turn * 1 + start) % 2 == number
                    else "0" * size
                )
            begin = 0
            for tensor in spec.tensors:
                end = begin + int(np.prod(tensor.shape))
                made[f"{spec.name}/{tensor.name}"] += "".join(row[begin:end] for row in rows)
                begin = end
    assert made == recorded


def test_recorded_normals_come_from_an_independent_transform() -> None:
    """Words 2p and 2p + 1 make entries 2p and 2p + 1 by Box and Muller's transform, in multiples of 2^-12."""
    recorded = json.loads(FILE.read_text())["gaussian"]
    for spec in SPECS:
        key = key_of(TASK.seed, TASK.round, TASK.slot, spec.name)
        entries: list[int] = []
        for draw in range(TASK.draws):
            words = words_of(key, STEP, 0, draw, spec.dimensions + spec.dimensions % 2)
            made: list[int] = []
            for a, b in zip(words[::2], words[1::2], strict=True):
                radius = math.sqrt(-2 * math.log(((a >> 11) + 1) / 2**53))
                angle = 2 * math.pi * (b >> 11) / 2**53
                made += [round(4096 * radius * math.cos(angle)), round(4096 * radius * math.sin(angle))]
            entries += made[: spec.dimensions] * len(EXAMPLES)
        got = [
            np.array(recorded[f"{spec.name}/{tensor.name}"].split(), int).reshape(
                TASK.draws, len(EXAMPLES), -1
            )
            for tensor in spec.tensors
        ]
        assert np.concatenate(got, axis=2).ravel().tolist() == entries


@pytest.mark.parametrize("count", [1, 4, 7, 255, 256, 300])
def test_words_of_many_addresses_are_those_of_numpys_generator(count: int) -> None:
    """Drawn together, the words of each key, draw and example equal numpy's own Philox at that counter."""
    keys = np.array([philox_key(1, 2, 3, name) for name in ("a", "b")])
    words = words_at(keys, 9, [0, 5, 2**40], [3, 1], count)
    assert words.shape == (2, 2, 3, count)
    for (row, k, i), _ in np.ndenumerate(words[..., 0]):
        counter = [0, (3, 1)[k], (0, 5, 2**40)[i], 9]
        wanted = np.random.Philox(key=keys[row], counter=counter).random_raw(count)
        assert np.array_equal(words[row, k, i], wanted)


def test_normals_are_standard_and_independent() -> None:
    """Of 65,536 normal entries mean, variance and fourth moment, and products of neighbours, are off by chance only.

    Standard deviations of the four means: 1, sqrt(2), sqrt(96) and 1, each over 256; five of them bound each. The
    batch shares its directions.
    """
    spec = SliceSpec("s", "lora_xs", (0,), "t", (TensorSpec("core", (1, 64), "core"),))
    task = replace(TASK, draws=1024, directions="gaussian")
    drawn = draw_tangents(task, [spec], 0, range(2))["s/core"].astype(float)
    assert np.array_equal(drawn[:, 0], drawn[:, 1])
    one = drawn[:, 0]
    assert abs(one.mean()) < 5 / 256
    assert abs((one**2).mean() - 1) < 5 * 2**0.5 / 256
    assert abs((one**4).mean() - 3) < 5 * 96**0.5 / 256
    for axis in range(2):
        assert abs((one * np.roll(one, 1, axis=axis)).mean()) < 5 / 256
    assert np.array_equal(one / GRAIN, np.rint(one / GRAIN))


def test_the_extreme_words_give_finite_normals() -> None:
    """All bits clear or set end in finite numbers within nine standard deviations."""
    words = np.array([[0, 0], [2**64 - 1, 2**64 - 1], [0, 2**64 - 1]], dtype=np.uint64)
    assert np.abs(normals(words, 2)).max() < 9


def test_bits_are_read_from_the_lowest() -> None:
    """The first sign is the lowest bit of the first word, on machines of either byte order."""
    got = signs(np.array([0b1011, 1], dtype=np.uint64), 66)
    assert got[:4].tolist() == [1, 1, -1, 1]
    assert (got[4:64] == -1).all()
    assert got[64:].tolist() == [1, -1]
    swapped = signs(np.array([0b1011, 1], dtype=">u8"), 66)
    assert np.array_equal(got, swapped)


ADDRESS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**63 - 1),
        "round": st.integers(0, 2**40),
        "slot": st.integers(0, 2**40),
        "step": st.integers(0, 2**31),
        "example": st.integers(0, 2**31),
        "draw": st.integers(0, 4096),
        "slice": st.text("abcdef.0123456789_-", min_size=1, max_size=20),
    }
)


def bits_at(address: dict) -> np.ndarray:
    key = philox_key(address["seed"], address["round"], address["slot"], address["slice"])
    return random_words(key, address["step"], address["example"], address["draw"], 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    address=ADDRESS,
    other=ADDRESS,
    field=st.sampled_from(["seed", "round", "slot", "step", "example", "draw", "slice"]),
)
def test_any_part_of_the_address_changes_the_bits(address: dict, other: dict, field: str) -> None:
    """Changing any one of seed, round, slot, step, example, draw and slice gives other bits (but for chance 2^-128)."""
    changed = {**address, field: other[field]}
    if changed == address:
        changed[field] = address[field] + ("x" if field == "slice" else 1)
    assert not np.array_equal(bits_at(address), bits_at(changed))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    draws=st.integers(1, 5),
    batch=st.integers(1, 4),
    directions=st.sampled_from(["per_example", "shared", "orthogonal"]),
)
def test_tangents_are_signs_of_the_right_shape(sizes, draws, batch, directions) -> None:
    """Every tangent is float32 of shape (K, B, *s) with entries +1 and -1 only."""
    specs = [
        SliceSpec(f"s{i}", "lora_xs", (0,), "t", (TensorSpec("core", (1, size), "core"),))
        for i, size in enumerate(sizes)
    ]
    task = replace(TASK, draws=draws, directions=directions)
    tangents = draw_tangents(task, specs, 0, range(batch))
    assert list(tangents) == [f"s{i}/core" for i in range(len(sizes))]
    for size, tangent in zip(sizes, tangents.values(), strict=True):
        assert tangent.shape == (draws, batch, size)
        assert tangent.dtype == np.float32
        assert (np.abs(tangent) == 1).all()
        if directions != "per_example":
            assert (tangent == tangent[:, :1]).all()


def test_an_examples_tangent_does_not_depend_on_its_micro_batch() -> None:
    """Examples drawn one at a time or in any order have the tangents they have together."""
    together = draw_tangents(TASK, SPECS, 1, range(6))
    reordered = draw_tangents(TASK, SPECS, 1, [4, 0])
    for name, tangent in together.items():
        assert np.array_equal(reordered[name], tangent[:, [4, 0]])


def test_one_slice_at_a_time_in_turn() -> None:
    """A one_slice direction is ±√S on one slice and zero on the others; the draws of the examples take each in turn."""
    task = replace(TASK, directions="one_slice", draws=2, batch_size=6)
    specs = [
        SliceSpec(f"s{i}", "lora_xs", (0,), "t", (TensorSpec("core", (1, i + 2), "core"),)) for i in range(3)
    ]
    tangents = draw_tangents(task, specs, 3, range(6))
    moved = np.stack([np.abs(t).reshape(2, 6, -1).max(-1) > 0 for t in tangents.values()])
    count = len(specs)
    assert (moved.sum(0) == 1).all()
    turns = moved.argmax(0).T.reshape(-1)
    assert np.array_equal(turns, (turns[0] + np.arange(12)) % count)
    for tangent in tangents.values():
        assert set(np.unique(np.abs(tangent))) == {np.float32(0), np.float32(count**0.5)}
    starts = {int(np.abs(draw_tangents(task, specs, step, [0])["s0/core"]).max() > 0) for step in range(20)}
    assert starts == {0, 1}


@pytest.mark.parametrize("directions", ["one_slice", "dealt"])
def test_the_turns_do_not_depend_on_the_micro_batch(directions: Directions) -> None:
    """Examples drawn in another order move the slices they move together."""
    task = replace(TASK, directions=directions, draws=3, batch_size=6)
    together, reordered = draw_tangents(task, SPECS, 1, range(6)), draw_tangents(task, SPECS, 1, [4, 0])
    for name, tangent in together.items():
        assert np.array_equal(reordered[name], tangent[:, [4, 0]])


def dealt_rows(task: Task, specs: Sequence[SliceSpec], name: str) -> np.ndarray:
    """All rows that a slice is dealt in a task, (V, d_s), in the order of steps, examples and draws."""
    rows = []
    for step in range(task.steps):
        tangent = draw_tangents(task, specs, step, range(task.batch_size))[name]
        rows += list(tangent.transpose(1, 0, *range(2, tangent.ndim)).reshape(-1, *tangent.shape[2:]))
    return np.stack([row.ravel() for row in rows if row.any()])


@pytest.mark.parametrize(("size", "order"), [(1, 1), (16, 16), (17, 32), (24, 32), (64, 64)])
def test_devices_deal_one_anothers_decks_on(size: int, order: int) -> None:
    """Over examples, draws, steps and slots the rows of a slice are whole decks: the sum of r rᵀ of each is S·n·I.

    Nothing is dealt twice within a deck, and entries are ±√S for S slices.
    """
    specs = [
        SliceSpec(f"s{i}", "lora_xs", (0,), "t", (TensorSpec("core", (1, size), "core"),)) for i in range(3)
    ]
    task = replace(TASK, directions="dealt", draws=3, batch_size=4, steps=2)
    slots = [dealt_rows(replace(task, slot=slot), specs, "s1/core") for slot in range(2 * order // 8 + 1)]
    rows = np.concatenate(slots)
    for begin in range(0, len(rows) // order * order, order):
        deck = rows[begin : begin + order].astype(float)
        np.testing.assert_allclose(deck.T @ deck, 3 * order * np.eye(size), atol=1e-4 * order)
        assert len(np.unique(deck, axis=0)) == order or size < order
    assert np.unique(np.abs(rows)).tolist() == [np.float32(3**0.5)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12, 25, 36, 72, 97])
def test_a_few_draws_are_spread_over_the_model(count: int) -> None:
    """All slices are met in as many turns, and of any 8 turns in a row each half of the model has at least 2."""
    stride = stride_over(count)
    met = [turn * stride % count for turn in range(count)]
    assert sorted(met) == list(range(count))
    if count >= 8:
        for first in range(count):
            early = sum((first + turn) * stride % count < count // 2 for turn in range(8))
            assert 2 <= early <= 6


def test_rounds_and_seeds_have_decks_of_their_own() -> None:
    """Decks are not dealt on from round to round, where values have moved, nor from run to run."""
    first = dealt_rows(replace(TASK, directions="dealt"), SPECS, "block0.query/core")
    for change in ({"round": 3}, {"seed": 5}):
        other = dealt_rows(replace(TASK, directions="dealt", **change), SPECS, "block0.query/core")
        assert not np.array_equal(first[:6], other[:6])


def test_the_largest_slot_and_step_are_dealt_too() -> None:
    """Numbers of turns beyond 64 bits are counted exactly: the last step of a huge task follows the one before it."""
    specs = SPECS[:1]
    task = replace(
        TASK,
        directions="dealt",
        slot=2**40,
        steps=2**31,
        batch_size=2**31,
        draws=16,
        slices=("block0.query",),
    )
    for step in (2**31 - 2, 2**31 - 1):
        rows = draw_tangents(task, specs, step, [2**31 - 1])["block0.query/core"].reshape(16, 16)
        assert np.array_equal(rows.T @ rows, 16 * np.eye(16))


@pytest.mark.parametrize("directions", sorted(get_args(Directions)))
def test_nothing_to_estimate_has_no_tangents(directions: Directions) -> None:
    """A task that trains the head alone draws nothing, whatever its directions are."""
    assert draw_tangents(replace(TASK, directions=directions), [], 0, range(4)) == {}


def test_signs_are_balanced_and_uncorrelated() -> None:
    """Among 65,536 signs ones and minus ones differ by chance only, and neighbours are independent.

    A sum of n signs has standard deviation sqrt(n) = 256; five of them bound each figure.
    """
    spec = SliceSpec("s", "lora_xs", (0,), "t", (TensorSpec("core", (1, 16), "core"),))
    drawn = draw_tangents(replace(TASK, draws=64), [spec], 0, range(64))["s/core"]
    limit = 5 * drawn.size**0.5
    assert abs(drawn.sum()) < limit
    for axis in range(3):
        assert abs((drawn * np.roll(drawn, 1, axis=axis)).sum()) < limit
    # Each single entry is balanced too: 4,096 signs, standard deviation 64.
    assert (np.abs(drawn.sum(axis=(0, 1))) < 5 * 64).all()


@pytest.mark.parametrize("order", [1, 2, 8, 64])
def test_hadamard_rows_are_orthogonal(order: int) -> None:
    """The full matrix times its transpose is order times the identity."""
    rows = hadamard_rows(np.arange(order), order)
    assert np.array_equal(rows @ rows.T, order * np.eye(order))


@pytest.mark.parametrize(("size", "order"), [(1, 1), (16, 16), (17, 32), (48, 64)])
def test_a_full_set_of_orthogonal_draws_spans_every_direction(size: int, order: int) -> None:
    """With as many draws as the order n, the sum of v vᵀ is n times the identity, over all slices together."""
    parts = [size // 3, size - size // 3] if size > 2 else [size]
    specs = [
        SliceSpec(f"s{i}", "lora_xs", (0,), "t", (TensorSpec("core", (1, part), "core"),))
        for i, part in enumerate(parts)
    ]
    for cycles in (1, 2):
        task = replace(TASK, draws=cycles * order, directions="orthogonal")
        drawn = draw_tangents(task, specs, 5, range(2))
        flat = np.concatenate([tangent[:, 0] for tangent in drawn.values()], axis=1)
        assert np.array_equal(flat.T @ flat, cycles * order * np.eye(size))


def test_orthogonal_draws_differ_from_step_to_step() -> None:
    """Each step has its own signs and row order."""
    task = replace(TASK, draws=4, directions="orthogonal")
    first, second = (draw_tangents(task, SPECS, step, [0])["block0.query/core"] for step in (0, 1))
    assert not np.array_equal(first, second)
