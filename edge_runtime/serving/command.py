"""``edge-runtime predict`` and ``edge-runtime serve``: their options, and what they do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from edge_runtime.inference.requests import Sampling
    from edge_runtime.serving.source import Model

DEFAULT_CONFIG = Path("/etc/edge-runtime/device.toml")
DEFAULT_ADDRESS = "127.0.0.1:8620"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands to a parser."""
    description = "tell labels of texts with probabilities, or generate text; lines of JSON come out"
    predict = commands.add_parser("predict", help=description, description=description)
    predict.add_argument(
        "text", nargs="?", metavar="TEXT", help="one text (default: rows of --data, or of standard input)"
    )
    predict.add_argument("--data", type=Path, metavar="FILE", help='JSON Lines, each an object {"text": "…"}')
    _add_model(predict)
    predict.add_argument(
        "--depth",
        metavar="BLOCK",
        help="number of the block behind which texts leave a model that was trained with exits, or auto: the first "
        "whose label is sure enough, of those that fit the cap (default: the deepest)",
    )
    predict.add_argument(
        "--confidence",
        type=float,
        metavar="SHARE",
        help="probability of a label that is enough under --depth auto (default: 0.9)",
    )
    _add_sampling(predict)
    predict.set_defaults(command=_predict)
    description = "answer predictions over HTTP to programs on this machine, with one worker that stays up"
    serve = commands.add_parser("serve", help=description, description=description)
    place = serve.add_mutually_exclusive_group()
    place.add_argument(
        "--listen",
        default=DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        help="loopback address to listen on (default: %(default)s)",
    )
    place.add_argument(
        "--socket", type=Path, metavar="PATH", help="Unix socket to listen on instead, of mode 0600"
    )
    _add_model(serve)
    serve.set_defaults(command=_serve)


def _add_model(sub: argparse.ArgumentParser) -> None:
    """The options by which a model is named."""
    sub.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        help="the device's configuration, whose current release is used without --package (default: %(default)s)",
    )
    sub.add_argument("--package", type=Path, metavar="FOLDER", help="package folder to use instead")
    sub.add_argument("--publisher-key", metavar="KEY", help="public key that must have signed --package")
    sub.add_argument(
        "--slices",
        type=Path,
        metavar="FILE",
        help="values for --package, as edge-coordinator run fetch-slices writes them (default: its initial ones)",
    )
    sub.add_argument("--cap", metavar="SIZE", help='memory granted with --package, such as "256M"')
    sub.add_argument(
        "--threads",
        type=int,
        default=0,
        help="threads of the engine with --package; 0 takes all (default: 0)",
    )
    sub.add_argument(
        "--prepared",
        type=Path,
        metavar="FOLDER",
        help="where --package is prepared for this machine (default: FOLDER-prepared)",
    )
    sub.add_argument(
        "--engine",
        choices=("onnxruntime", "executorch"),
        default="onnxruntime",
        help="what runs the programs of --package (default: %(default)s)",
    )


def _add_sampling(sub: argparse.ArgumentParser) -> None:
    """The options by which text is generated."""
    sub.add_argument(
        "--max-tokens",
        type=int,
        default=0,
        metavar="COUNT",
        help="most tokens to generate; 0: as there is room for",
    )
    sub.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="what logits are divided by; 0 takes the most probable token (default: %(default)s)",
    )
    sub.add_argument(
        "--top-k", type=int, default=0, metavar="COUNT", help="draw from so many tokens; 0: from all"
    )
    sub.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="draw from the most probable tokens that make up this share (default: %(default)s)",
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of the draws (default: %(default)s)")
    sub.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="STRING",
        help="end the text before this string; may be given again (default: none)",
    )


def _predict(arguments: argparse.Namespace) -> int:
    import msgspec

    from edge_runtime.serving.lines import PredictLine
    from edge_runtime.serving.predict import open_rows, predict_rows, predict_text
    from edge_runtime.serving.session import InferenceSession

    if arguments.text is not None and arguments.data is not None:
        raise ConfigError("give a text or --data, not both")
    if arguments.text is not None and not arguments.text.strip():
        raise ConfigError("the text is empty; give one, or leave it out to read rows from standard input")
    sampling = _sampling(arguments)
    model = _at_depth(_model(arguments)()[0], arguments)
    rows = None if arguments.text is not None else open_rows(arguments.data)
    model.prepare()

    def write(line: PredictLine) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
        sys.stdout.buffer.flush()

    task = model.package.manifest.task
    with InferenceSession.start(model.job()) as session:
        if rows is None:
            for line in predict_text(session, task, arguments.text, sampling):
                write(line)
            return 0
        file, name = rows
        with file:
            error = predict_rows(session, task, file, name, sampling, write)
    if error is not None:
        raise error
    return 0


def _at_depth(model: Model, arguments: argparse.Namespace) -> Model:
    """The model at the depth that was asked for."""
    confidence = arguments.confidence
    if confidence is not None and arguments.depth != "auto":
        raise ConfigError("--confidence goes with --depth auto")
    if confidence is not None and not 0 < confidence <= 1:
        raise ConfigError(f"--confidence is {confidence}, must be above 0 and at most 1")
    if arguments.depth is None:
        return model
    return model.at_depth(arguments.depth, 0.9 if confidence is None else confidence)


def _serve(arguments: argparse.Namespace) -> int:
    import signal
    import threading

    from edge_runtime.log import note, start_logging
    from edge_runtime.serving.http_server import (
        PredictionServer,
        Served,
        listen_on_port,
        listen_on_socket,
    )

    host, port = _address(arguments.listen)
    served = Served(_model(arguments))
    start_logging()
    try:
        served.open()
        path = arguments.socket
        listener = listen_on_port(host, port) if path is None else listen_on_socket(path)
        try:
            with PredictionServer(listener, served) as server:
                stop = threading.Event()
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, lambda *_: stop.set())
                threading.Thread(target=server.serve_forever, daemon=True).start()
                where = (
                    str(path) if path is not None else "http://{}:{}".format(*_shown(listener.getsockname()))
                )
                note("listening", at=where)
                stop.wait()
                server.shutdown()
        finally:
            if path is not None:
                path.unlink(missing_ok=True)
    finally:
        served.close()
    note("stopped")
    return 0


def _shown(name: tuple[str, int]) -> tuple[str, int]:
    """Host and port as a URL has them."""
    host, port = name[:2]
    return (f"[{host}]" if ":" in host else host), port


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--listen {text!r} must read HOST:PORT, as {DEFAULT_ADDRESS}")
    return host.strip("[]"), int(port)


def _sampling(arguments: argparse.Namespace) -> Sampling:
    import msgspec

    from edge_runtime.inference.requests import Sampling

    fields = {name: getattr(arguments, name) for name in Sampling.__struct_fields__}
    try:
        return msgspec.convert(fields, Sampling)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$.")
        option = place.partition("`")[0].partition("[")[0].replace("_", "-")
        raise ConfigError(f"--{option}: {problem}") from error


def _model(arguments: argparse.Namespace) -> Callable[[], tuple[Model, str]]:
    """A function that gives the model that is named and the id of its release, if it is one."""
    from edge_runtime.config_file import parse_cap
    from edge_runtime.serving.source import model_of_folder

    if arguments.package is None:
        given = [
            name
            for name in ("slices", "cap", "publisher_key", "prepared")
            if getattr(arguments, name) is not None
        ]
        if given:
            option = given[0].replace("_", "-")
            raise ConfigError(
                f"--{option} goes with --package; without it the device's current release is used"
            )
        return _release(arguments.config)
    missing = [name for name in ("cap", "publisher_key") if getattr(arguments, name) is None]
    if missing:
        raise ConfigError(f"--package needs --{missing[0].replace('_', '-')}, too")
    if not 0 <= arguments.threads <= MAX_THREADS:
        raise ConfigError(f"--threads is {arguments.threads}; it may be 0 to {MAX_THREADS}")
    model = model_of_folder(
        arguments.package,
        arguments.slices,
        arguments.publisher_key,
        parse_cap(arguments.cap),
        arguments.threads,
        arguments.engine,
        arguments.prepared,
    )
    return lambda: (model, "")


#: Bound beyond any machine, which catches a slip of the hand.
MAX_THREADS = 256


def _release(config: Path) -> Callable[[], tuple[Model, str]]:
    """A function that gives the device's release that is current at the moment."""
    from edge_runtime.agent.config import load_config
    from edge_runtime.serving.source import model_of_release

    loaded = load_config(config)
    return lambda: model_of_release(loaded)
