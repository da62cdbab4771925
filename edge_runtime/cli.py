"""``edge-runtime``: the device's command line.

A command's libraries are imported when it runs. Errors of this project end it with one line on standard
error and the exit code of their class, explained in docs/errors.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime import __version__
from edge_runtime.exit_status import exit_code_of
from edge_runtime.serving.command import add_commands

if TYPE_CHECKING:
    from edge_runtime.profile.request import PlanRequest


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = build_parser().parse_args(words)
    arguments.words = words
    return exit_code_of(lambda: int(arguments.command(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = argparse.ArgumentParser(
        prog="edge-runtime",
        description="Train slices of a language model on this device, under a memory cap.",
    )
    parser.add_argument("--version", action="version", version=f"edge-runtime {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, description in (
        ("run", _run, "serve the coordinator until stopped; enrols first if need be"),
        ("enrol", _enrol, "join the coordinator with the one-time token, and stop"),
        ("check", _check, "say what, if anything, keeps this device from serving"),
        (
            "doctor",
            _doctor,
            "look at the machine and at this device: OK, WARN or FAIL with the cure, a line each",
        ),
        (
            "support-bundle",
            _support_bundle,
            "write what helps somebody else to help, without secrets and rows",
        ),
        ("status", _status, "show identity, release, downloads and a result that waits"),
    ):
        sub = commands.add_parser(name, help=description, description=description)
        if name != "run":
            _add_json(sub)
        if name == "support-bundle":
            sub.add_argument(
                "--output",
                type=Path,
                default=Path("edge-runtime-support.tar.gz"),
                help="file to write (default: %(default)s)",
            )
        sub.add_argument(
            "--config",
            type=Path,
            default=Path("/etc/edge-runtime/device.toml"),
            help="the device's configuration (default: %(default)s)",
        )
        sub.set_defaults(command=command)
    _add_plan(commands)
    _add_profile(commands)
    add_commands(commands)
    return parser


def _add_json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="as JSON, for programs")


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    description = "say how a step of training would be done within a cap, and what it would take"
    sub = commands.add_parser("plan", help=description, description=description)
    _add_work(sub)
    sub.add_argument("--what-if", action="store_true", help="add a table of other sizes")
    _add_json(sub)
    sub.set_defaults(command=_plan)


def _add_profile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    description = "train here for some steps and report where the memory went, against the cap"
    sub = commands.add_parser("profile", help=description, description=description)
    _add_work(sub)
    sub.add_argument("--data", type=Path, required=True, metavar="FILE", help="rows as the device has them")
    sub.add_argument("--steps", type=int, default=100, help="steps of the task (default: %(default)s)")
    sub.add_argument(
        "--threads", type=int, help="threads of the engine (default: every core this process may use)"
    )
    sub.add_argument("--weights", choices=("resident", "streamed"), help="force where weights are")
    sub.add_argument("--micro-batch", type=int, metavar="EXAMPLES", help="force how many run at a time")
    sub.add_argument(
        "--output",
        type=Path,
        default=Path("report"),
        help="path of the report without its ending (default: %(default)s)",
    )
    sub.add_argument("--against", type=Path, metavar="JSON", help="an earlier report to compare with")
    sub.add_argument(
        "--tolerance",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="growth of the peak over the earlier report's that is accepted (default: %(default)s)",
    )
    sub.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="the model folder the package was made from: compares with backpropagation in PyTorch",
    )
    _add_json(sub)
    sub.set_defaults(command=_profile)


def _add_work(sub: argparse.ArgumentParser) -> None:
    """The options by which work is asked for."""
    sub.add_argument("package", metavar="PACKAGE", type=Path, help="package folder")
    sub.add_argument("--cap", required=True, metavar="SIZE", help='memory granted, such as "256M"')
    sub.add_argument("--batch", type=int, default=8, help="examples of a step (default: %(default)s)")
    sub.add_argument(
        "--sequence", type=int, metavar="TOKENS", help="tokens of a row (default: the package's limit)"
    )
    sub.add_argument("--draws", type=int, default=1, help="tangents per example (default: %(default)s)")
    sub.add_argument("--slices", metavar="NAME,...", help="slices to train beside the head (default: all)")
    sub.add_argument(
        "--update",
        choices=("forward", "backprop", "best"),
        default="forward",
        help='how the slices\' gradient is found; best is what a run with update = "best" takes here, of at most'
        " --draws (default: %(default)s)",
    )
    sub.add_argument("--publisher-key", metavar="KEY", help="public key that must have signed the package")
    sub.add_argument(
        "--prepared",
        type=Path,
        metavar="FOLDER",
        help="where the package is prepared for this machine (default: PACKAGE-prepared)",
    )
    sub.add_argument(
        "--engine",
        choices=("onnxruntime", "executorch"),
        default="onnxruntime",
        help="what runs the programs (default: %(default)s)",
    )


def _plan(arguments: argparse.Namespace) -> int:
    from edge_runtime.json_output import json_text
    from edge_runtime.profile.plan_text import plan_answer, plan_lines

    request = _request(arguments, arguments.prepared)
    if arguments.json:
        print(json_text(plan_answer(request)))
    else:
        print("\n".join(plan_lines(request, with_options=arguments.what_if)))
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    import shlex

    from edge_runtime.engines.choice import threads_or_all
    from edge_runtime.json_output import json_text
    from edge_runtime.profile.measure import Settings
    from edge_runtime.profile.run import profile_package
    from edge_runtime.profile.text import difference_line

    report = profile_package(
        Settings(
            request=_request(arguments, None),  # where it is not prepared, profiling prepares it
            data=arguments.data,
            steps=arguments.steps,
            threads=threads_or_all() if arguments.threads is None else arguments.threads,
            output=arguments.output,
            command=shlex.join(["edge-runtime", *arguments.words]),
            weights=arguments.weights,
            micro_batch=arguments.micro_batch,
            against=arguments.against,
            tolerance=arguments.tolerance,
            model=arguments.model,
            prepared_folder=arguments.prepared,
        )
    )
    if arguments.json:
        print(json_text(report.profile))
    else:
        print(report.text.partition("\n\n")[0])
        if report.difference is not None:
            print(difference_line(report.difference))
        for note in report.profile.notes:
            print(f"note: {note}")
        for path in report.paths:
            print(f"written: {path}")
    if report.error is not None:
        raise report.error
    return 0


def _request(arguments: argparse.Namespace, prepared_folder: Path | None) -> PlanRequest:
    from edge_runtime.profile.request import parse_request

    return parse_request(
        arguments.package,
        arguments.cap,
        batch=arguments.batch,
        sequence=arguments.sequence,
        draws=arguments.draws,
        slices=arguments.slices,
        update=arguments.update,
        publisher_key=arguments.publisher_key,
        prepared_folder=prepared_folder,
        engine=arguments.engine,
    )


def _run(arguments: argparse.Namespace) -> int:
    from edge_runtime.agent.client import Client
    from edge_runtime.agent.config import load_config
    from edge_runtime.agent.daemon import Agent
    from edge_runtime.agent.enrolment import ensure_identity
    from edge_runtime.agent.service_manager import ServiceManager
    from edge_runtime.agent.store import Store
    from edge_runtime.agent.transport import HttpTransport
    from edge_runtime.engines.choice import engine_version
    from edge_runtime.log import start_logging

    config = load_config(arguments.config)
    engine_version(config.engine)  # a device without its engine must not take tasks, nor enrol
    start_logging()
    store = Store(config.state_folder, disk_quota_bytes=config.disk_quota)
    service_manager = ServiceManager()
    transport = HttpTransport(config.coordinator_url, service_manager.alive)
    with store.locked():
        identity = ensure_identity(config, store, transport)
        Agent(
            config,
            store,
            Client(transport, store.key(), identity.device_id),
            identity,
            service_manager=service_manager,
        ).run()
    return 0


def _enrol(arguments: argparse.Namespace) -> int:
    from edge_runtime.agent.config import load_config
    from edge_runtime.agent.enrolment import ensure_identity
    from edge_runtime.agent.store import Store
    from edge_runtime.agent.transport import HttpTransport
    from edge_runtime.json_output import json_text

    config = load_config(arguments.config)
    store = Store(config.state_folder, disk_quota_bytes=config.disk_quota)
    with store.locked():
        if aside := store.set_identity_aside():
            print(f"the identity cannot be read, and is kept as {aside}; enrolling anew", file=sys.stderr)
        identity = ensure_identity(config, store, HttpTransport(config.coordinator_url))
    if arguments.json:
        print(json_text(identity))
    else:
        print(f"enrolled as {identity.device_id}; tasks must be signed by {identity.coordinator_public_key}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from edge_runtime.agent.check import CheckLine, Finding, check_device
    from edge_runtime.agent.config import load_config
    from edge_runtime.agent.store import Store
    from edge_runtime.agent.transport import HttpTransport
    from edge_runtime.json_output import json_text

    config = load_config(arguments.config)
    lines = []

    def tell(line: CheckLine) -> None:
        lines.append(line)
        if not arguments.json:
            print(f"{'failed' if line.error else 'ok    '} {line.name}: {line.detail}", flush=True)

    tell(CheckLine.of(Finding("config", str(arguments.config))))
    store = Store(config.state_folder, disk_quota_bytes=config.disk_quota)
    for finding in check_device(config, store, HttpTransport(config.coordinator_url)):
        tell(CheckLine.of(finding))
    if arguments.json:
        print(json_text(lines))
    return next((line.exit_code for line in lines if line.error), 0)


def _doctor(arguments: argparse.Namespace) -> int:
    from edge_runtime.agent.doctor import examine
    from edge_runtime.json_output import json_text

    found = []
    for diagnosis in examine(arguments.config):
        found.append(diagnosis)
        if not arguments.json:
            print(diagnosis.line, flush=True)
    if arguments.json:
        print(json_text(found))
    return next((each.exit_code for each in found if each.level == "FAIL"), 0)


def _support_bundle(arguments: argparse.Namespace) -> int:
    from edge_runtime.agent.doctor import examine
    from edge_runtime.agent.support_bundle import Bundle, write_support_bundle
    from edge_runtime.json_output import json_text

    write_support_bundle(arguments.config, arguments.output, examine(arguments.config))
    if arguments.json:
        print(json_text(Bundle(str(arguments.output), arguments.output.stat().st_size)))
        return 0
    print(
        f"wrote {arguments.output}; it holds no keys, tokens or rows, but addresses and paths: look before you send it"
    )
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from edge_runtime.agent.status import read_status, status_lines
    from edge_runtime.json_output import json_text

    status = read_status(arguments.config)
    if arguments.json:
        print(json_text(status))
    else:
        print("\n".join(status_lines(status)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
