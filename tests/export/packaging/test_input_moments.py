from __future__ import annotations

from dataclasses import replace

import torch
from transformers import AutoModel, AutoTokenizer

from edge_runtime.data.rows import NO_LABEL, Row
from export.packaging.input_moments import ROWS, input_moments
from export.packaging.mask_scores import Scoring
from export.slices.lora_xs import factors, whitened_factors
from tests.export import tiny

QUERIES = tuple(f"encoder.layer.{block}.attention.self.query" for block in range(2))


def asked(model, texts: tuple[str, ...]) -> Scoring:
    """Unlabelled rows, which do as well."""
    rows = tuple(Row(text, NO_LABEL) for text in texts)
    return Scoring(model, "classification", len(tiny.LABELS), rows, 32, ("query",), seed=1)


def test_moments_are_those_of_the_hidden_states(tiny_model) -> None:
    """They are what transformers gives as hidden states of each block, over real tokens alone, of the first rows."""
    texts = tuple(tiny.SENTENCES[:5])
    found = input_moments(asked(tiny_model, texts), lambda _: None)
    assert tuple(found) == QUERIES
    model, tokenizer = AutoModel.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(tiny_model)
    states = []
    with torch.no_grad():
        for text in texts:  # one at a time: no padding
            given = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
            states.append(model(**given, output_hidden_states=True).hidden_states)
    for block, name in enumerate(QUERIES):
        entering = torch.cat([each[block][0] for each in states]).double()
        torch.testing.assert_close(found[name], entering.T @ entering / len(entering), rtol=1e-4, atol=1e-6)
    many = (*texts, *(["quiet"] * ROWS))
    first = input_moments(asked(tiny_model, many[:ROWS]), lambda _: None)
    torch.testing.assert_close(input_moments(asked(tiny_model, many), lambda _: None), first)


def test_a_package_stores_the_factors_of_its_inputs(tiny_model, tmp_path) -> None:
    """With moments, a slice's frozen factors are the whitened ones of its weight, and others without."""
    moments = input_moments(asked(tiny_model, tuple(tiny.SENTENCES)), lambda _: None)
    options = tiny.options(tiny_model, tmp_path, targets=("query",), rank=2)
    weights = AutoModel.from_pretrained(tiny_model).state_dict()
    for given in ({}, moments):
        stored, _ = tiny.store_model(replace(options, slices=replace(options.slices, moments=given)))
        for name in QUERIES:
            weight = weights[f"{name}.weight"]
            scale = options.slices.alpha / 2
            up, down = whitened_factors(weight, given[name], 2, scale) if given else factors(weight, 2, scale)
            tensors = stored.in_memory()
            torch.testing.assert_close(tensors[f"encoder.{name}.up"], up)
            torch.testing.assert_close(tensors[f"encoder.{name}.down"], down)
