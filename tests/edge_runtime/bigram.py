"""A causal language model written by hand, small enough to differentiate on paper, as a package that runs.

With e the embedding of a token, its next token has logits (e + e·C)·U; the slice is C, a full matrix that starts at
zero. Decode programs keep hidden states as keys and values, and use none of them. Programs are ONNX text; what they
should give is computed here again in numpy, with a gradient in closed form.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx.parser
from tokenizers import Tokenizer, models, pre_tokenizers

from edge_runtime.data.batches import NOT_PREDICTED, Batch
from edge_runtime.package.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SIGNATURE,
    Base,
    FileEntry,
    Generation,
    Manifest,
    Program,
    Segment,
    SelfCheck,
    SizeTerm,
    SliceSpec,
    TensorRef,
    TensorSpec,
    Variant,
)
from edge_runtime.package.package import Package
from edge_runtime.package.slices import encode_values
from edge_runtime.protocol.signing import PrivateKey

WORDS = ("<pad>", "<unk>", "the", "cat", "dog", "sat", "ran", "home")
HIDDEN = 6
#: Rows of the embedding: preparing a package runs it on random tokens, more of them than there are words.
ROWS = 64
SLICE, CORE = "block_0.mix", "block_0.mix/core"
HEADER = '<ir_version: 9, opset_import: ["" : 18]>\n'
#: The head's loss and count; {extra} is its tangent.
HEAD = """
head (float[B,T,6] hidden, {dot} int64[B,T] labels, float[6,8] output)
  => (float[B] loss_out, {loss_dot} int64[B] correct_out)
<int64[1] last = {{-1}}, int64[1] one = {{1}}, int64 zero = {{0}}>
{{
  logits = MatMul(hidden, output)
  log_p = LogSoftmax<axis = -1>(logits)
  counted = GreaterOrEqual(labels, zero)
  mask = Cast<to = 1>(counted)
  count = ReduceSum<keepdims = 0>(mask, one)
  safe = Max(labels, zero)
  index = Unsqueeze(safe, last)
  chosen = GatherElements<axis = 2>(log_p, index)
  picked = Squeeze(chosen, last)
  scored = Mul(picked, mask)
  total = ReduceSum<keepdims = 0>(scored, one)
  mean = Div(total, count)
  loss_out = Neg(mean)
  best = ArgMax<axis = -1, keepdims = 0>(logits)
  equal = Equal(best, labels)
  hits = Cast<to = 7>(equal)
  correct_out = ReduceSum<keepdims = 0>(hits, one)
  {extra}
}}
"""
HEAD_TANGENT = """
  logits_dot = MatMul(hidden_dot, output)
  p = Exp(log_p)
  weighted = Mul(p, logits_dot)
  expected = ReduceSum<keepdims = 1>(weighted, last)
  log_p_dot = Sub(logits_dot, expected)
  shape = Shape(logits_dot)
  draws = Slice(shape, start, one)
  side = Shape(index)
  wide = Concat<axis = 0>(draws, side)
  spread = Expand(index, wide)
  chosen_dot = GatherElements<axis = 3>(log_p_dot, spread)
  picked_dot = Squeeze(chosen_dot, last)
  scored_dot = Mul(picked_dot, mask)
  two = Add(one, one)
  total_dot = ReduceSum<keepdims = 0>(scored_dot, two)
  mean_dot = Div(total_dot, count)
  loss_dot_out = Neg(mean_dot)
"""
PROGRAMS = {
    "embedding": """
embedding (int64[B,T] input_ids, float[64,6] embedding) => (float[B,T,6] hidden_out)
{ hidden_out = Gather(embedding, input_ids) }
""",
    "block": """
block (float[B,T,6] hidden, float[1,6,6] core) => (float[B,T,6] hidden_out)
{ mixed = MatMul(hidden, core)
  hidden_out = Add(hidden, mixed) }
""",
    "block_entry": """
block_entry (float[B,T,6] hidden, float[1,6,6] core, float[K,B,6,6] core_dot)
  => (float[B,T,6] hidden_out, float[K,B,T,6] hidden_dot_out)
{ mixed = MatMul(hidden, core)
  hidden_out = Add(hidden, mixed)
  hidden_dot_out = MatMul(hidden, core_dot) }
""",
    "block_dual": """
block_dual (float[B,T,6] hidden, float[K,B,T,6] hidden_dot, float[1,6,6] core, float[K,B,6,6] core_dot)
  => (float[B,T,6] hidden_out, float[K,B,T,6] hidden_dot_out)
{ mixed = MatMul(hidden, core)
  hidden_out = Add(hidden, mixed)
  carried = MatMul(hidden_dot, core)
  made = MatMul(hidden, core_dot)
  moved = Add(hidden_dot, carried)
  hidden_dot_out = Add(moved, made) }
""",
    "head": HEAD.format(dot="", loss_dot="", extra=""),
    "head_dual": HEAD.format(
        dot="float[K,B,T,6] hidden_dot,", loss_dot="float[K,B] loss_dot_out,", extra=HEAD_TANGENT
    ).replace("int64[1] one", "int64[1] start = {0}, int64[1] one"),
    "embedding_decode": """
embedding_decode (int64[B,T] input_ids, int64[B,P] past_mask, float[64,6] embedding) => (float[B,T,6] hidden_out)
{ hidden_out = Gather(embedding, input_ids) }
""",
    "block_decode": """
block_decode (float[B,T,6] hidden, float[B,1,P,6] past_key, float[B,1,P,6] past_value, float[1,6,6] core)
  => (float[B,T,6] hidden_out, float[B,1,S,6] key_out, float[B,1,S,6] value_out)
<int64[1] one = {1}>
{ mixed = MatMul(hidden, core)
  hidden_out = Add(hidden, mixed)
  row = Unsqueeze(hidden, one)
  key_out = Concat<axis = 2>(past_key, row)
  value_out = Concat<axis = 2>(past_value, row) }
""",
    "head_decode": """
head_decode (float[B,T,6] hidden, float[6,8] output) => (float[B,8] logits_out)
<int64 last = {-1}>
{ final = Gather<axis = 1>(hidden, last)
  logits_out = MatMul(final, output) }
""",
    "probe": """
probe (uint8[8,64] x, int8[64,32] matrix) => (float[8,32] product_out)
{ whole = MatMulInteger(x, matrix)
  product_out = Cast<to = 1>(whole) }
""",
}
FED = {
    **dict.fromkeys(("embedding", "embedding_decode"), ("embedding",)),
    **dict.fromkeys(("head", "head_dual", "head_decode"), ("output",)),
}


@dataclass(frozen=True)
class Bigram:
    """The package, and the numbers that it was made of.

    Attributes:
        package: the package.
        embedding: (64, H) float32 embedding, one row a token.
        output: (H, 8) float32 output layer U.
    """

    package: Package
    embedding: np.ndarray
    output: np.ndarray

    def loss(self, batch: Batch, core: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Loss and count of right tokens of each example, (B,), in float64; ``core`` is (H, H)."""
        loss, _, right = self._scored(batch, core)
        return loss, right

    def gradients(self, batch: Batch, core: np.ndarray) -> np.ndarray:
        """Gradient of each example's loss in the core, (B, H, H): mean over its tokens of e ⊗ U·(p - onehot)."""
        return self._scored(batch, core)[1]

    def _scored(self, batch: Batch, core: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        losses, gradients, counts = [], [], []
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            places = np.flatnonzero(labels != NOT_PREDICTED)
            e = self.embedding[ids[places]].astype(np.float64)
            logits = (e + e @ core) @ self.output
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            wanted = labels[places]
            losses.append(-np.log(p[np.arange(len(places)), wanted]).mean())
            counts.append((logits.argmax(1) == wanted).sum())
            p[np.arange(len(places)), wanted] -= 1
            gradients.append(e.T @ (p @ self.output.T.astype(np.float64)) / len(places))
        return np.array(losses), np.array(gradients), np.array(counts)


def write_bigram(folder: Path, key: PrivateKey) -> Bigram:
    """Write the package into ``folder``, signed by ``key``; weights are drawn from a fixed seed."""
    generator = np.random.default_rng(5)
    embedding = generator.standard_normal((ROWS, HIDDEN)).astype(np.float32)
    output = generator.standard_normal((HIDDEN, len(WORDS))).astype(np.float32)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    files = {
        f"programs/{name}.onnx": onnx.parser.parse_model(HEADER + text).SerializeToString()
        for name, text in PROGRAMS.items()
    }
    files |= {
        "weights/embedding.bin": embedding.tobytes(),
        "weights/head.bin": output.tobytes(),
        "tokenizer.json": tokenizer.to_str().encode(),
        "slices.safetensors": encode_values({CORE: np.zeros((1, HIDDEN, HIDDEN), np.float32)}),
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    data = msgspec.json.encode(_manifest(files))
    (folder / MANIFEST).write_bytes(data)
    (folder / SIGNATURE).write_text(key.sign(data))
    return Bigram(Package.open(folder, key.public_key), embedding, output)


def _manifest(files: dict[str, bytes]) -> Manifest:
    embedding = TensorRef("weights/embedding.bin", 0, "float32", (ROWS, HIDDEN))
    output = TensorRef("weights/head.bin", 0, "float32", (HIDDEN, len(WORDS)))
    core = TensorSpec("core", (1, HIDDEN, HIDDEN), "core")
    return Manifest(
        format_version=FORMAT_VERSION,
        name="bigram",
        task="causal_lm",
        labels=(),
        sequence_limit=16,
        pad_token_id=0,
        base=Base("bigram", "by hand", (ROWS + len(WORDS)) * HIDDEN, HIDDEN, "none"),
        files={name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()},
        programs={name: _program(name) for name in PROGRAMS if name != "probe"},
        segments=(
            Segment(
                "embedding", "embedding", None, None, {"embedding": embedding}, decode="embedding_decode"
            ),
            Segment("block_0", "block", "block_entry", "block_dual", {}, decode="block_decode"),
            Segment("head", "head", None, "head_dual", {"output": output}, decode="head_decode"),
        ),
        slices=(SliceSpec(SLICE, "lora_xs", (1,), "mix", (core,)),),
        tokenizer="tokenizer.json",
        initial_state="slices.safetensors",
        self_checks={"float": SelfCheck(1, 0.0, 0.0, 1.0)},
        probe="programs/probe.onnx",
        generation=Generation(1, HIDDEN, HIDDEN),
    )


def _program(name: str) -> Program:
    graph = onnx.parser.parse_model(HEADER + PROGRAMS[name]).graph
    fed = FED.get(name, ())
    values = 4.0 * HIDDEN * (4 if name.startswith("head") else 2)
    live = (SizeTerm(values, 1, 1, 0), SizeTerm(values, 1, 1, 1))
    return Program(
        tuple(value.name for value in graph.input if value.name not in fed),
        tuple(value.name.removesuffix("_out") for value in graph.output),
        {"float": Variant(f"programs/{name}.onnx", fed, live=(live,))},
    )
