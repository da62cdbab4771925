"""The table of the slices bench, from figures by arm and seed."""

from __future__ import annotations

from benchmarks.learning.slices import rows


def test_arms_are_compared_over_the_seeds_that_both_have() -> None:
    """A gap is a mean over common seeds, has its range, and says whether it is within reach."""
    found = {
        "dylora 8": {0: {"accuracy": 70.0, "ece": 1.0}, 1: {"accuracy": 72.0, "ece": 1.0}},
        "lora 8": {1: {"accuracy": 74.0, "ece": 1.0}, 2: {"accuracy": 60.0, "ece": 1.0}},
        "sizes sparse": {0: {"uplink": 100, "numbers": 10, "state": 80}},
        "sizes lora 8": {0: {"uplink": 500, "numbers": 60, "state": 480}},
        "live 96": {0: {"4 draws": 2e6}},
    }
    table = {row.name: row for row in rows("TREC", found)}
    gap = table["TREC: DyLoRA read at rank 8 over LoRA r=8 alone"]
    assert (gap.value, gap.low, gap.high, gap.met) == (-2.0, -2.0, -2.0, False)
    share = table["TREC: uplink of sparse at 1 %, over LoRA r=8"]
    assert (share.value, share.reach, share.met) == (0.2, 0.1, False)
    assert table["TREC: dylora 8 (2 seeds)"].value == 71.0
    assert table["TREC: lora 8: uplink of the slices"].value == 0.5
    assert (
        table["TREC: predicted live set of a block, 96 of 1536 activations, 64 tokens, 4 draws"].value == 2.0
    )
    assert not any("mixed" in name or "exits" in name for name in table)


def test_languages_are_told_as_a_stand_in() -> None:
    """Robustness over languages says with each figure that it stands in for a published metric."""
    found = {"languages sparse": {0: {"seen": 10.0, "unseen": -2.0, "crrm_standin": 4.0}}}
    table = rows("SIB-200", found)
    assert [(row.name, row.value) for row in table] == [
        ("SIB-200: sparse, robustness, seen (a stand-in)", 10.0),
        ("SIB-200: sparse, robustness, unseen (a stand-in)", -2.0),
        ("SIB-200: sparse, robustness, crrm_standin (a stand-in)", 4.0),
    ]
