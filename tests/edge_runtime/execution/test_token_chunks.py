"""The output layer of a language model in parts gives what it gives whole."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from edge_runtime.data.batches import NOT_PREDICTED
from edge_runtime.engines.engine import Array
from edge_runtime.execution.token_chunks import run_in_chunks

ROWS, TOKENS, WIDTH, WORDS, DRAWS = 3, 11, 5, 7, 2


def output_layer(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Cross-entropy of softmax(hidden·W), its jvp, its gradient, and hits; as an exported program defines them."""
    hidden, labels, weight = inputs["hidden"].astype(np.float64), inputs["labels"], inputs["weight"]
    logits = hidden @ weight
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    predicted = labels != NOT_PREDICTED
    chosen = np.where(predicted, labels, 0)[..., None]
    losses = -np.log(np.take_along_axis(shares, chosen, -1)[..., 0])
    onehot = np.zeros_like(shares)
    np.put_along_axis(onehot, chosen, 1, -1)
    with np.errstate(invalid="ignore"):
        each = (predicted / predicted.sum(1, keepdims=True)).astype(np.float64)
    bar = ((shares - onehot) @ weight.T) * each[..., None]
    return {
        "loss": np.where(predicted, losses * each, 0).sum(1) + 0 * each.sum(1),
        "loss_dot": (inputs["hidden_dot"] * bar).sum((2, 3)),
        "hidden_bar": bar.astype(np.float32),
        "correct": ((logits.argmax(-1) == labels) & predicted).sum(1),
    }


def sample() -> dict[str, Array]:
    """Rows of 11, 6 and 2 tokens; the last chunks predict nothing of the short ones."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, WORDS, (ROWS, TOKENS))
    for row, length in enumerate((TOKENS, 6, 2)):
        labels[row, length - 1 :] = NOT_PREDICTED
    return {
        "hidden": generator.standard_normal((ROWS, TOKENS, WIDTH), dtype=np.float32),
        "hidden_dot": generator.standard_normal((DRAWS, ROWS, TOKENS, WIDTH), dtype=np.float32),
        "labels": labels,
        "weight": generator.standard_normal((WIDTH, WORDS)),
    }


@pytest.mark.parametrize("tokens", [1, 3, 4, TOKENS, 64])
def test_parts_add_up_to_the_whole(tokens: int) -> None:
    """Loss, jvp, cotangent and hits are the same however many tokens run at a time, rows of any length."""
    inputs = sample()
    whole, got = output_layer(inputs), run_in_chunks(output_layer, inputs, tokens)
    assert set(got) == set(whole)
    for name, expected in whole.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_no_more_tokens_run_at_a_time() -> None:
    """The program never sees more tokens than asked, its parts are contiguous, and empty parts are left out."""
    inputs, seen = sample(), []

    def watched(given: Mapping[str, Array]) -> dict[str, Array]:
        seen.append(given["labels"].shape[1])
        assert given["hidden"].flags.c_contiguous
        assert given["hidden_dot"].flags.c_contiguous
        return output_layer(given)

    inputs["labels"][:, 5:] = NOT_PREDICTED
    run_in_chunks(watched, inputs, 4)
    assert seen == [4, 4]


def test_a_loss_that_is_not_finite_stays_so() -> None:
    """A part's infinite loss is not hidden by the others: the step must be seen to have failed."""
    inputs = sample()
    inputs["hidden"][0, 0] = np.nan
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(run_in_chunks(output_layer, inputs, 4)["loss"][0])
