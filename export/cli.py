"""The command line ``edge-export``: make a package, make a signing key, turn a result into an adapter or a model."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.errors import ConfigError, ModelError
from edge_runtime.exit_status import exit_code_of
from edge_runtime.figures import size, whole_size
from edge_runtime.slices.kinds import KINDS

if TYPE_CHECKING:
    from edge_runtime.engines.names import EngineName
    from edge_runtime.package.manifest import Manifest
    from edge_runtime.package.package import Package
    from edge_runtime.package.slices import Values
    from edge_runtime.protocol.signing import PrivateKey
    from export.slices.sliced_linear import SliceOptions

#: What an option for a lower rank does.
OF_RANKS = "take the first ranks of LoRA slices alone (default: all)"
#: Sizes (batch, sequence, draws) for which the summary predicts memory.
SUMMARY_SIZES = ((1, 64, 1), (8, 64, 1), (8, 128, 1), (8, 128, 4))


def main(argv: list[str] | None = None) -> int:
    """Run a command; errors are one line on standard error, and the error's exit code."""
    arguments = build_parser().parse_args(argv)
    return exit_code_of(lambda: arguments.command(arguments))


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = argparse.ArgumentParser(prog="edge-export", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    package = commands.add_parser("package", help="export a Hugging Face model folder as a package")
    package.add_argument("model", type=Path, help="folder with config.json, weights and tokenizer")
    package.add_argument(
        "--task",
        choices=("classification", "causal_lm"),
        default="classification",
        help="causal_lm trains a decoder to predict the next token (default: %(default)s)",
    )
    package.add_argument("--labels", type=Path, help="JSON array of the label set; for classification")
    package.add_argument("--check-data", type=Path, required=True, help="JSONL rows for the self-check")
    package.add_argument("--output", type=Path, required=True, metavar="DIR", help="package folder to create")
    package.add_argument("--key", type=Path, required=True, help="signing key, from 'edge-export key'")
    package.add_argument(
        "--slice", choices=tuple(KINDS), help="kind of slices (default: lora_xs; lora with --adapter)"
    )
    package.add_argument(
        "--rank", type=int, help="rank of the slices; of --slice rows the number of rows (default: 4)"
    )
    package.add_argument("--alpha", type=float, help="update scale is alpha / rank (default: 4)")
    package.add_argument(
        "--density",
        type=float,
        metavar="SHARE",
        help="share of each adapted layer's weight that --slice sparse trains (default: 0.01)",
    )
    package.add_argument(
        "--mask",
        choices=("movement", "fisher", "random"),
        help="how --slice sparse chooses the entries: those that a short training on --check-data moves most, those on "
        "which the loss hangs most by forward mode, or any (default: movement)",
    )
    package.add_argument(
        "--factors",
        choices=("weight", "inputs"),
        help="what --slice lora_xs makes its frozen factors of: each layer's weight, or what enters the layer too, as "
        "the float model has it on --check-data, for which that model must fit in memory (default: weight)",
    )
    package.add_argument(
        "--mlp-topk",
        type=int,
        metavar="K",
        help="keep the K largest activations of each feed-forward part, for each token, and set the others to zero "
        "(default: keep all)",
    )
    package.add_argument(
        "--targets",
        metavar="NAME,...",
        help="module names as peft's target_modules, or all-linear (default: the layers that make queries and values)",
    )
    package.add_argument(
        "--sequence-limit",
        type=int,
        default=128,
        metavar="TOKENS",
        help="longest sequence (default: %(default)s)",
    )
    package.add_argument(
        "--quant",
        choices=("int8", "int4", "none"),
        default="int8",
        help="quantisation of frozen weights (default: %(default)s)",
    )
    package.add_argument(
        "--with-adjoint", action="store_true", help="also write the programs that backpropagation runs"
    )
    package.add_argument(
        "--with-generation",
        action="store_true",
        help="also write the programs by which devices generate text, of a causal language model",
    )
    package.add_argument(
        "--engine",
        default="onnxruntime",
        metavar="NAME,...",
        help="what devices may run it on: onnxruntime, or onnxruntime,executorch (default: %(default)s)",
    )
    package.add_argument(
        "--seed", type=int, default=0, help="seed of LoRA's random factor (default: %(default)s)"
    )
    package.add_argument(
        "--adapter",
        type=Path,
        metavar="FOLDER",
        help="peft adapter to start from; gives rank, targets, values",
    )
    package.add_argument(
        "--trust-remote-code", action="store_true", help="let Python code in the model folder run"
    )
    package.set_defaults(command=_package)

    _add_other_commands(commands)
    return parser


def _add_other_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Keys, what becomes of trained slices, and conversions."""
    key = commands.add_parser("key", help="make a signing key and print its public half")
    key.add_argument("file", type=Path, help="file to create; one that exists is never overwritten")
    key.set_defaults(command=_key)

    adapter = commands.add_parser("adapter", help="write trained slices as a peft adapter")
    adapter.add_argument("package", type=Path, help="package folder that was trained")
    adapter.add_argument(
        "--slices", type=Path, required=True, help="slice values, from 'edge-coordinator run fetch-slices'"
    )
    adapter.add_argument("--publisher-key", required=True, help="public key that signed the package")
    adapter.add_argument("--rank", type=int, help=OF_RANKS)
    adapter.add_argument("--base-model", required=True, help="model name or path to record")
    adapter.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to create")
    adapter.set_defaults(command=_adapter)

    merge = commands.add_parser("merge", help="write the float model with trained slices merged in")
    merge.add_argument("package", type=Path, help="package folder that was trained")
    merge.add_argument("model", type=Path, help="folder that the package was exported from")
    merge.add_argument(
        "--slices", type=Path, required=True, help="slice values, from 'edge-coordinator run fetch-slices'"
    )
    merge.add_argument("--publisher-key", required=True, help="public key that signed the package")
    merge.add_argument("--rank", type=int, help=OF_RANKS)
    merge.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to create")
    merge.set_defaults(command=_merge)

    cut = commands.add_parser("cut", help="write a package with the first ranks of its LoRA slices alone")
    cut.add_argument("package", type=Path, help="package folder, exported with --slice lora")
    cut.add_argument("--rank", type=int, required=True, help="number of first ranks to keep")
    cut.add_argument(
        "--slices",
        type=Path,
        help="trained slice values that it starts from, from 'edge-coordinator run fetch-slices' (default: the "
        "package's own initial ones)",
    )
    cut.add_argument("--publisher-key", required=True, help="public key that signed the package")
    cut.add_argument("--key", type=Path, required=True, help="signing key, from 'edge-export key'")
    cut.add_argument("--output", type=Path, required=True, metavar="DIR", help="package folder to create")
    cut.set_defaults(command=_cut)

    onnx = commands.add_parser("onnx", help="write a merged classifier as one ONNX file with its tokenizer")
    onnx.add_argument("model", type=Path, help="folder that 'edge-export merge' wrote")
    onnx.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to create")
    onnx.set_defaults(command=_onnx)

    llama2c = commands.add_parser(
        "llama2c", help="turn a llama2.c checkpoint into a Hugging Face model folder"
    )
    llama2c.add_argument("checkpoint", type=Path, help="checkpoint of version 0, such as stories260K.bin")
    llama2c.add_argument("tokenizer", type=Path, help="its tokenizer, such as tok512.bin")
    llama2c.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to create")
    llama2c.set_defaults(command=_llama2c)


def _package(arguments: argparse.Namespace) -> int:
    from edge_runtime.data.rows import load_rows
    from export.packaging.early_checks import check_early

    # What files and options alone tell comes before torch and transformers are loaded, which takes seconds.
    started = time.monotonic()
    _check_ranges(arguments)
    engines = read_engines(arguments.engine)
    labels = _labels(arguments)
    if arguments.with_generation and arguments.task != "causal_lm":
        raise ConfigError(
            "--with-generation is for --task causal_lm: a classifier generates no text; leave it out"
        )
    key = _read_key(arguments.key)
    trusted = arguments.trust_remote_code
    check_early(arguments.model, labels, arguments.output, engines, trust_remote_code=trusted)
    if arguments.mlp_topk is not None:
        _check_topk(arguments, engines)
    if arguments.adapter is not None:
        _check_adapter(arguments, labels)
    rows = load_rows(arguments.check_data, labels)

    def progress(stage: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {stage}", flush=True)

    progress("Loading torch")
    _quieten_libraries()
    from export.packaging.export_package import ExportOptions, export_package

    options = ExportOptions(
        model=arguments.model,
        labels=labels,
        output=arguments.output,
        slices=_slice_options(arguments),
        sequence_limit=arguments.sequence_limit,
        quantisation=arguments.quant,
        check_texts=tuple(row.text for row in rows),
        task=arguments.task,
        adapter=arguments.adapter,
        trust_remote_code=trusted,
        with_adjoint=arguments.with_adjoint,
        engines=engines,
        with_generation=arguments.with_generation,
        mask=arguments.mask or "movement",
        factors=arguments.factors or "weight",
        check_labels=tuple(row.label for row in rows),
        mlp_topk=arguments.mlp_topk,
    )
    notes: list[str] = []
    package = export_package(options, key, progress, notes.append)
    progress("Done")
    print("\n" + summary(package, notes))
    return 0


def _key(arguments: argparse.Namespace) -> int:
    from edge_runtime.protocol.signing import generate_key

    if arguments.file.exists():
        raise ConfigError(
            f"{arguments.file} exists already, and a key is never overwritten; use it, or name another file"
        )
    key = generate_key()
    key.save(arguments.file)
    print(key.public_key)
    return 0


def _adapter(arguments: argparse.Namespace) -> int:
    package, values = _trained(arguments)
    _quieten_libraries()
    from export.adapters.write import write_adapter

    print(write_adapter(package, values, arguments.output, arguments.base_model))
    _say_what_is_not_carried(package)
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    package, values = _trained(arguments)
    _quieten_libraries()
    from export.adapters.merge import merge

    merged = merge(package, values, arguments.model, arguments.output)
    if merged.left_out:
        print(f"left out: {', '.join(merged.left_out)}")
    if merged.taken_out:
        print(
            f"taken out: {', '.join(merged.taken_out)}, a classifier that was not trained with the slices; "
            "load_classifier.py beside the weights loads the one that was"
        )
    print(f"{merged.folder} (changed: {', '.join(merged.changed)})")
    _say_what_is_not_carried(package)
    return 0


def _say_what_is_not_carried(package: Package) -> None:
    """A line if the model that devices ran computes something that neither an adapter nor a model folder can say."""
    top = package.manifest.mlp_topk
    if top:
        print(
            f"not carried: the {top.kept} of {top.width} activations that feed-forward parts keep (--mlp-topk); "
            "whoever loads this keeps all, and predicts otherwise than devices do"
        )


def _cut(arguments: argparse.Namespace) -> int:
    from edge_runtime.package.package import Package
    from export.packaging.cut_package import cut_package

    key, rank = _read_key(arguments.key), _rank(arguments)
    if arguments.slices is None:
        package = Package.open(arguments.package, arguments.publisher_key)
        package.verify_files()
        values = None
    else:
        arguments.rank = None  # values of all ranks are read, and cut with the package
        package, values = _trained(arguments)
        if package.manifest.head_blocks:
            raise ConfigError(
                "--slices hold a head over several blocks, which belongs to a run and to no package; leave --slices out"
            )
    made = cut_package(package, rank, arguments.output, key, values)
    ranked = [spec for spec in made.manifest.slices if spec.kind != "head"]
    numbers = sum(spec.dimensions for spec in ranked)
    print(
        f"{made.folder}: rank {rank}, {numbers} trainable numbers in {len(ranked)} slices\nsha256 {made.sha256}"
    )
    return 0


def _onnx(arguments: argparse.Namespace) -> int:
    if not arguments.model.is_dir():
        raise ModelError(f"{arguments.model} is no folder; give the one that edge-export merge wrote")
    _quieten_libraries()
    from export.adapters.onnx_model import write_onnx

    print(write_onnx(arguments.model, arguments.output))
    return 0


def _trained(arguments: argparse.Namespace) -> tuple[Package, Values]:
    from edge_runtime.package.block_head import head_of, with_block_head
    from edge_runtime.package.package import Package
    from edge_runtime.package.ranked_values import cut
    from edge_runtime.package.ranks import with_rank
    from edge_runtime.package.slices import decode_values

    if arguments.output.exists():
        raise ModelError(f"{arguments.output} exists already; choose another --output or remove it")
    package = Package.open(arguments.package, arguments.publisher_key)
    package.verify_files()
    try:
        data = arguments.slices.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read --slices {arguments.slices}: {error.strerror}; get them with: "
            f"edge-coordinator run fetch-slices --output {arguments.slices}"
        ) from error
    package = Package(package.folder, with_block_head(package.manifest, *head_of(data)), package.sha256)
    values = decode_values(data, package.manifest.slices)
    if getattr(arguments, "rank", None) is None:
        return package, values
    narrowed = with_rank(package.manifest, _rank(arguments))
    return Package(package.folder, narrowed, package.sha256), cut(values, narrowed.slices)


def _rank(arguments: argparse.Namespace) -> int:
    """The number of ranks that were asked for; :class:`ConfigError` if it is none."""
    if arguments.rank < 1:
        raise ConfigError(f"--rank is {arguments.rank}, must be at least 1")
    return int(arguments.rank)


def _labels(arguments: argparse.Namespace) -> tuple[str, ...]:
    if arguments.task == "classification":
        if arguments.labels is None:
            raise ConfigError("classification needs --labels, a JSON array of the label set")
        from export.model.labels import read_labels

        return read_labels(arguments.labels)
    if arguments.labels is not None:
        raise ConfigError("a causal language model has no labels; leave --labels out")
    return ()


def _llama2c(arguments: argparse.Namespace) -> int:
    _quieten_libraries()
    from export.llama2c.convert import convert

    shape = convert(arguments.checkpoint, arguments.tokenizer, arguments.output)
    print(
        f"{arguments.output}: {shape.n_layers} blocks of {shape.dim}, {shape.vocab_size} tokens, "
        f"texts of up to {shape.max_seq_len}"
    )
    return 0


def read_engines(text: str) -> tuple[EngineName, ...]:
    """The engines to export for, from a list with commas; :class:`ConfigError` if one is unknown or ONNX is missing."""
    from edge_runtime.engines.names import ENGINES

    names = {name.strip() for name in text.split(",")}
    if not names <= set(ENGINES) or "onnxruntime" not in names:
        raise ConfigError(f"--engine is {text!r}; it may be onnxruntime, or onnxruntime,executorch")
    return tuple(name for name in ENGINES if name in names)


def summary(package: Package, notes: Sequence[str] = ()) -> str:
    """Sizes, trainable dimensions, predicted memory, the comparison with torch and what was not used, for people.

    Args:
        package: package that was made.
        notes: sentences about what of the model folder is not used, or used otherwise than its files say.
    """
    from edge_runtime.package.held import moved_part

    manifest = package.manifest
    groups: dict[str, int] = {}
    for path, entry in manifest.files.items():
        group = path.split("/", maxsplit=1)[0]
        groups[group] = groups.get(group, 0) + entry.bytes
    rows = next(iter(manifest.self_checks.values())).rows
    lines = [
        f"package    {package.folder}",
        f"sha256     {package.sha256}",
        f"base       {manifest.base.architecture}, {manifest.base.parameters / 1e6:.1f} M parameters, "
        f"{manifest.base.quantisation}",
        "sizes      " + ", ".join(f"{name} {size(count)}" for name, count in sorted(groups.items())),
        *_head_lines(manifest),
        *_topk_lines(manifest),
        "slices",
        *(
            f"  {spec.name:<42} {spec.kind:<8} {moved_part(spec).dimensions:>7} trainable"
            for spec in manifest.slices
        ),
        "predicted peak of a training worker",
        *_predictions(manifest),
        f"largest relative difference from torch on {rows} rows of real text, by arithmetic",
        *(
            f"  {name:<10} loss {check.loss:.1e}, jvp {check.jvp:.1e}, jvp cosine {check.jvp_cosine:.4f}"
            + ("" if check.gradient is None else f", gradient {check.gradient:.1e}")
            for name, check in manifest.self_checks.items()
        ),
        *_executorch_lines(manifest),
    ]
    if effect := manifest.quantisation_effect:
        lines.append(
            f"effect of {manifest.base.quantisation} weights on {effect.rows} rows: loss {effect.loss:.2%}, "
            f"jvp cosine {effect.jvp_cosine:.4f}"
        )
    if notes:
        lines += ["notes", *(f"  {sentence}" for sentence in notes)]
    return "\n".join(lines)


def _head_lines(manifest: Manifest) -> list[str]:
    """What the head starts from, and what its features are."""
    if manifest.head is None:
        return []
    if manifest.head_features == "own":
        return [f"head       a trained classifier ({manifest.head.target}), which training goes on from"]
    pooled = {"mean": "mean over tokens", "first": "first token", "last": "last token"}
    return [f"head       new, from zero, over the {pooled[manifest.head_features]}"]


def _topk_lines(manifest: Manifest) -> list[str]:
    """How many activations are kept, and what that does on the rows of the self-check."""
    top = manifest.mlp_topk
    if not top:
        return []
    return [
        f"top-k      {top.kept} of {top.width} activations of each token kept in feed-forward parts; measured: "
        f"{top.density:.1%} not zero, {top.positive:.1%} above zero before"
    ]


def _executorch_lines(manifest: Manifest) -> list[str]:
    """How ExecuTorch's programs compare with torch, the memory planned for each, and what XNNPACK did not take."""
    lines = [
        f"on ExecuTorch, {name}: loss {check.loss:.1e}, jvp {check.jvp:.1e}"
        for name, check in manifest.executorch_checks.items()
    ]
    for name, program in manifest.programs.items():
        for variant in program.executorch.values():
            lines.append(f"  {name}: {size(variant.planned_bytes)} planned ahead; not delegated to XNNPACK:")
            lines += [f"    {each.nodes:>4} {each.operator}: {each.reason}" for each in variant.undelegated]
    return lines


def _predictions(manifest: Manifest) -> list[str]:
    from edge_runtime.memory.plan import Planner, Work, choices

    slices = tuple(spec.name for spec in manifest.slices if spec.kind != "head")
    planner, lines = Planner(manifest), []
    limit = manifest.sequence_limit  # sizes that a short limit makes one are told once
    for batch, sequence, draws in dict.fromkeys((b, min(s, limit), d) for b, s, d in SUMMARY_SIZES):
        work = Work(batch, sequence, draws, slices)
        largest = planner.plan(work, next(choices(work))).peak.total_bytes
        smallest = planner.smallest(work).peak.total_bytes
        lines.append(
            f"  batch {batch}, {sequence} tokens, {draws} {'draw' if draws == 1 else 'draws'}: "
            f"{whole_size(largest)} at best speed, {whole_size(smallest)} at least"
        )
    return lines


def _quieten_libraries() -> None:
    """Standard error is for our one line: no progress bars, load reports or deprecations of others."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    # transformers imports torchao where it finds it; ExecuTorch brings it, without its CUDA libraries.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _read_key(path: Path) -> PrivateKey:
    from edge_runtime.protocol.signing import PrivateKey

    if not path.exists():
        raise ConfigError(f"there is no key file {path}; make one with: edge-export key {path}")
    return PrivateKey.load(path)


def _check_ranges(arguments: argparse.Namespace) -> None:
    """Refuse numbers out of range, and options that an adapter settles: rank and targets; for LoRA the scale too."""
    if arguments.adapter is not None:
        takes_scale = KINDS[arguments.slice or "lora"].pair is not None
        own = ("rank", "targets", *(["alpha"] if takes_scale else []))
        if given := [name for name in own if getattr(arguments, name) is not None]:
            raise ConfigError(f"--{given[0]} is the adapter's own; leave it out beside --adapter")
    for option, low, high in (("rank", 1, 1024), ("sequence_limit", 2, 1 << 20), ("seed", 0, 1 << 62)):
        value = getattr(arguments, option)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"--{option.replace('_', '-')} is {value}, must be from {low} to {high}")
    _check_kind(arguments)
    if arguments.alpha is not None and not 0 < arguments.alpha <= 1e6:
        raise ConfigError(f"--alpha is {arguments.alpha}, must be above 0 and at most 1e6")


def _check_kind(arguments: argparse.Namespace) -> None:
    """Refuse options of another kind of slices than the one that is chosen."""
    if arguments.slice == "rows":
        _check_rows(arguments)
    sparse = arguments.slice == "sparse"
    for name in ("rank", "alpha") if sparse else ("density", "mask"):
        if getattr(arguments, name) is not None:
            chosen = "sparse has no rank: take --density" if sparse else "it belongs to --slice sparse"
            raise ConfigError(f"--{name} does not go with this kind of slices: {chosen}")
    kind = arguments.slice or ("lora_xs" if arguments.adapter is None else "lora")
    if arguments.factors is not None and kind != "lora_xs":
        raise ConfigError(
            f"--factors does not go with this kind of slices: {kind} has none; take --slice lora_xs, or leave it out"
        )
    if sparse and arguments.adapter is not None:
        raise ConfigError("--slice sparse cannot start from --adapter: merge it into the model first")
    if arguments.density is not None and not 0 < arguments.density <= 1:
        raise ConfigError(f"--density is {arguments.density}, must be above 0 and at most 1")


def _check_rows(arguments: argparse.Namespace) -> None:
    """Refuse what rows of a weight do not have: a scale, and an adapter that they could start from."""
    if arguments.alpha is not None:
        raise ConfigError("--alpha does not go with this kind of slices: rows have no scale; leave it out")
    if arguments.adapter is not None:
        raise ConfigError("--slice rows cannot start from --adapter: merge it into the model first")


def _check_topk(arguments: argparse.Namespace, engines: tuple[EngineName, ...]) -> None:
    """Refuse a number of activations that the model's feed-forward parts do not have, and an engine without them."""
    from export.model.feed_forward import check_kept
    from export.model.folder import read_config

    check_kept(arguments.mlp_topk, read_config(arguments.model))
    if "executorch" in engines:
        raise ConfigError(
            "--mlp-topk has no programs for ExecuTorch; leave executorch out of --engine, or --mlp-topk"
        )


def _check_adapter(arguments: argparse.Namespace, labels: tuple[str, ...]) -> None:
    """Refuse an adapter that cannot start the package, before anything heavy is imported."""
    from export.adapters.read import Wanted, check_adapter
    from export.model.folder import read_config

    architecture = str(read_config(arguments.model).get("model_type"))
    check_adapter(arguments.adapter, Wanted(arguments.model, architecture, arguments.task, labels))


def _slice_options(arguments: argparse.Namespace) -> SliceOptions:
    from export.slices.sliced_linear import SliceOptions

    return SliceOptions(
        kind=arguments.slice or ("lora_xs" if arguments.adapter is None else "lora"),
        rank=4 if arguments.rank is None else arguments.rank,
        alpha=4.0 if arguments.alpha is None else arguments.alpha,
        targets=tuple(name.strip() for name in (arguments.targets or "").split(",") if name.strip()),
        seed=arguments.seed,
        density=0.01 if arguments.density is None else arguments.density,
    )


if __name__ == "__main__":
    raise SystemExit(main())
