"""The command line ``edge-coordinator``: serve, and what operators ask of a running coordinator."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.durable import write_durably
from edge_runtime.exit_status import exit_code_of

if TYPE_CHECKING:
    from coordinator.admin.client import AdminClient
    from coordinator.storage.stores import Places


def main(argv: list[str] | None = None) -> int:
    """Run a command; errors are one line on standard error, and the error's exit code."""
    arguments = build_parser().parse_args(argv)
    return exit_code_of(lambda: arguments.command(arguments))


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = argparse.ArgumentParser(prog="edge-coordinator", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve devices and operators")
    serve.add_argument(
        "--state", type=Path, required=True, metavar="DIR", help="state folder, made on first use"
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8440, help="0 takes any free port (default: %(default)s)")
    serve.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    serve.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")
    serve.add_argument(
        "--insecure-http", action="store_true", help="plain HTTP on an address that is not loopback"
    )
    serve.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="form of the log lines on standard error (default: %(default)s)",
    )
    _add_places(serve)
    serve.add_argument(
        "--direct-blobs",
        action="store_true",
        help="with --blobs: devices that can do so fetch blobs from the bucket itself, by addresses that are signed for"
        " 15 minutes; they must reach its endpoint",
    )
    serve.set_defaults(command=_serve)

    _add_copies(commands)

    simulate = commands.add_parser("simulate", help="simulate fleets that run this coordinator's own code")
    simulate.add_argument("config", type=Path, metavar="CONFIG.toml", help="the simulation's configuration")
    simulate.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for results, made on first use, gone on with after",
    )
    simulate.add_argument("--arms", metavar="A,B", help="only these arms")
    simulate.add_argument("--seeds", metavar="0,1", help="only these seeds")
    simulate.add_argument(
        "--threads",
        type=int,
        default=0,
        help="threads of the inference engine; 0 takes one for each core (default: %(default)s)",
    )
    simulate.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="train on a Ray cluster's machines; without ADDRESS on the cluster started on this one",
    )
    simulate.add_argument(
        "--page", action="store_true", help="only make comparison.html and comparison.txt again"
    )
    simulate.set_defaults(command=_simulate)

    where = argparse.ArgumentParser(add_help=False)
    where.add_argument(
        "--state", type=Path, metavar="DIR", help="state folder of a coordinator on this machine"
    )
    where.add_argument("--url", help="address of a coordinator elsewhere")
    where.add_argument("--admin-token-file", type=Path, metavar="FILE", help="its admin.token")
    where.add_argument("--ca", type=Path, metavar="FILE", help="certificates to trust for https, PEM")

    status = commands.add_parser(
        "status", parents=[where], help="say whether all is well, and if not what to do; exits with 1 if not"
    )
    status.add_argument("--json", action="store_true", help="as JSON, for programs")
    status.set_defaults(command=_status)

    token = commands.add_parser("token", parents=[where], help="make a one-time enrolment token")
    token.add_argument(
        "--valid-s", type=float, default=86400.0, help="seconds until it expires (default: %(default)s)"
    )
    token.set_defaults(command=_token)

    _add_devices(commands, where)
    _add_runs(commands, where)
    _add_releases(commands, where)
    _add_users(commands, where)
    return parser


def _add_copies(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    backup = commands.add_parser(
        "backup", help="copy a coordinator's whole state into a folder, while it serves"
    )
    backup.add_argument("--state", type=Path, required=True, metavar="DIR", help="its state folder")
    _add_places(backup)
    backup.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the copy")
    backup.set_defaults(command=_backup)
    restore = commands.add_parser("restore", help="fill a new state folder, or new servers, from a backup")
    restore.add_argument("backup", type=Path, metavar="BACKUP", help="folder that backup wrote")
    restore.add_argument("--state", type=Path, required=True, metavar="DIR", help="new state folder")
    _add_places(restore)
    restore.set_defaults(command=_restore)
    migrate = commands.add_parser("migrate", help="move a state folder's database and blobs to servers")
    migrate.add_argument(
        "--state",
        type=Path,
        required=True,
        metavar="DIR",
        help="state folder of a coordinator that has ended",
    )
    _add_places(migrate)
    migrate.set_defaults(command=_migrate)


def _backup(arguments: argparse.Namespace) -> int:
    from coordinator.storage.copies import backup

    count = backup(arguments.state, _places(arguments), arguments.output)
    print(
        f"wrote {arguments.output}: the database, its keys and {count} blobs; keep it as secret as the state folder"
    )
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    from coordinator.storage.copies import restore

    count = restore(arguments.backup, arguments.state, _places(arguments))
    print(f"restored the database and {count} blobs; start the coordinator with the same options")
    return 0


def _migrate(arguments: argparse.Namespace) -> int:
    from coordinator.storage.copies import migrate

    count = migrate(arguments.state, _places(arguments))
    print(f"moved the database and {count} blobs; start the coordinator with the same options")
    return 0


def _add_places(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--database",
        metavar="URL",
        help="postgresql://USER@HOST/NAME, which several coordinators may share; its password comes from PGPASSFILE or"
        " PGPASSWORD (default: a file of SQLite in the state folder)",
    )
    command.add_argument(
        "--blobs",
        metavar="URL",
        help="s3://BUCKET/PREFIX?endpoint=https://HOST; its keys come from AWS_ACCESS_KEY_ID and"
        " AWS_SECRET_ACCESS_KEY, or AWS_SHARED_CREDENTIALS_FILE (default: folders in the state folder)",
    )
    command.add_argument(
        "--secrets",
        type=Path,
        metavar="DIR",
        help="folder of task.key and admin.token, which coordinators of one database have in common (default: the state"
        " folder)",
    )


def _places(arguments: argparse.Namespace) -> Places:
    from coordinator.storage.stores import Places

    return Places(arguments.database, arguments.blobs, arguments.secrets)


def _add_devices(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], where: argparse.ArgumentParser
) -> None:
    device = commands.add_parser("device", help="devices").add_subparsers(required=True, metavar="COMMAND")
    revoke = device.add_parser("revoke", parents=[where], help="refuse all further requests of a device")
    revoke.add_argument("name", help="the device's name or id")
    revoke.set_defaults(command=_revoke)
    resume = device.add_parser(
        "resume", parents=[where], help="let the run ask a device again that it has set aside"
    )
    resume.add_argument("name", help="the device's name or id")
    resume.set_defaults(command=_resume)
    fleet = device.add_parser("list", parents=[where], help="list all devices and what state they are in")
    fleet.add_argument("--json", action="store_true", help="as JSON, for programs")
    fleet.set_defaults(command=_list_devices)


def _add_runs(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], where: argparse.ArgumentParser
) -> None:
    run = commands.add_parser("run", help="runs").add_subparsers(required=True, metavar="COMMAND")
    new = run.add_parser("new", help="write a run.toml for a package, with every key explained")
    new.add_argument("package", type=Path, metavar="PACKAGE", help="package folder")
    new.add_argument(
        "--publisher-key", required=True, metavar="KEY", help="public key that must have signed the package"
    )
    new.add_argument(
        "--evaluation-data",
        type=Path,
        metavar="FILE",
        help="rows by which the coordinator evaluates the model",
    )
    new.add_argument(
        "--output",
        type=Path,
        default=Path("run.toml"),
        metavar="FILE",
        help="file to write, which must not exist yet (default: %(default)s)",
    )
    new.set_defaults(command=_new_run)
    create = run.add_parser("create", parents=[where], help="queue a run")
    create.add_argument("config", type=Path, metavar="run.toml", help="the run's configuration")
    create.add_argument(
        "--one-visit",
        action="store_true",
        help="train nothing: ask every device once for sums, and solve for the head in closed form",
    )
    create.add_argument(
        "--continue-from",
        metavar="NAME",
        help="go on from the sums of an earlier run, named by name or id: devices hand in what has changed since",
    )
    create.set_defaults(command=_create_run)
    listing = run.add_parser("list", parents=[where], help="list all runs")
    listing.set_defaults(command=_list_runs)
    for name, command, text in (
        ("show", _show_run, "show a run and its rounds"),
        ("watch", _watch_run, "show a run and its rounds, live until it has ended"),
        ("stop", _stop_run, "stop a run"),
        ("pause", _pause_run, "open no more rounds of a run until it is resumed"),
        ("resume", _resume_run, "let a paused run go on"),
        ("rollback", _roll_back_run, "let a run stand again where it stood after a committed round"),
        ("report", _report_run, "write report.html, report.txt, report.json and curve.svg"),
        ("fetch-slices", _fetch_slices, "fetch a run's slice values as safetensors"),
        ("export", _export_run, "hand a run's rounds and events to other tools"),
    ):
        sub = run.add_parser(name, parents=[where], help=text)
        changes = name in ("stop", "pause", "resume", "rollback")
        default = "the only one that has not ended" if changes else "the newest"
        sub.add_argument(
            "run_id", nargs="?", metavar="NAME", help=f"the run's name or id (default: {default})"
        )
        sub.add_argument("--run", metavar="NAME", help="the same, as an option")
        sub.set_defaults(command=command)
        if name == "rollback":
            sub.add_argument(
                "--to",
                type=int,
                required=True,
                metavar="NUMBER",
                help="round after which the run shall stand; later ones stay in its history and count no more",
            )
        if name == "report":
            sub.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
        if name == "fetch-slices":
            sub.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
        if name == "export":
            _add_export(sub)


def _add_export(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--events", type=Path, metavar="FILE", help="rounds and events as JSON lines; - is standard output"
    )
    sub.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="scalars as an event file, in DIR/<run id>"
    )
    sub.add_argument("--mlflow", metavar="URL", help="a run with parameters and metrics on a tracking server")


def _add_releases(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], where: argparse.ArgumentParser
) -> None:
    release = commands.add_parser("release", help="values for devices to use")
    inner = release.add_subparsers(required=True, metavar="COMMAND")
    publish = inner.add_parser("publish", parents=[where], help="publish a run's values for devices to use")
    publish.add_argument(
        "run_id", nargs="?", metavar="NAME", help="the run's name or id (default: the newest)"
    )
    publish.add_argument("--run", metavar="NAME", help="the same, as an option")
    publish.add_argument(
        "--round",
        type=int,
        metavar="NUMBER",
        help="values after this committed round (default: the run's result)",
    )
    publish.add_argument(
        "--lowest-accuracy",
        type=float,
        metavar="SHARE",
        help="devices that predict a smaller share of their own rows right keep what they have",
    )
    publish.add_argument(
        "--highest-loss",
        type=float,
        metavar="LOSS",
        help="devices whose own rows have a larger mean loss keep what they have",
    )
    publish.add_argument(
        "--each-round", action="store_true", help="publish each further committed round of the run, too"
    )
    publish.set_defaults(command=_publish)
    listing = inner.add_parser("list", parents=[where], help="list all releases")
    listing.add_argument("--json", action="store_true", help="as JSON, for programs")
    listing.set_defaults(command=_list_releases)


def _add_users(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], where: argparse.ArgumentParser
) -> None:
    user = commands.add_parser("user", help="people who may sign in").add_subparsers(
        required=True, metavar="COMMAND"
    )
    add = user.add_parser(
        "add", parents=[where], help="add a user, and print a token unless there is a password"
    )
    add.add_argument("name", help="the user's name")
    add.add_argument(
        "--role",
        required=True,
        choices=("viewer", "operator", "admin"),
        help="a viewer looks, an operator acts on runs and devices, an admin also keeps users",
    )
    add.add_argument(
        "--password-file", type=Path, metavar="FILE", help="file whose first line is the user's password"
    )
    add.set_defaults(command=_add_user)
    listing = user.add_parser("list", parents=[where], help="list all users")
    listing.add_argument("--json", action="store_true", help="as JSON, for programs")
    listing.set_defaults(command=_list_users)
    remove = user.add_parser("remove", parents=[where], help="remove a user and end all its sessions")
    remove.add_argument("name", help="the user's name")
    remove.set_defaults(command=_remove_user)
    audit = commands.add_parser("audit", parents=[where], help="show who did what, and what came of it")
    audit.add_argument(
        "--limit",
        type=int,
        default=100,
        metavar="COUNT",
        help="acts to show, the newest (default: %(default)s)",
    )
    audit.add_argument("--json", action="store_true", help="as JSON, for programs")
    audit.set_defaults(command=_audit)


def _serve(arguments: argparse.Namespace) -> int:
    from coordinator.api.serve import ServeOptions, bind
    from coordinator.auth import ADMIN_TOKEN
    from coordinator.monitoring.log_lines import set_up

    handler = logging.StreamHandler(sys.stderr)
    set_up(handler, arguments.log_format)
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    server = bind(
        ServeOptions(
            state=arguments.state,
            host=arguments.host,
            port=arguments.port,
            tls_cert=arguments.tls_cert,
            tls_key=arguments.tls_key,
            insecure_http=arguments.insecure_http,
            places=replace(_places(arguments), direct=arguments.direct_blobs),
        )
    )
    token = (arguments.secrets or arguments.state) / ADMIN_TOKEN
    print(f"coordinator at {server.url}; admin token in {token}", flush=True)
    server.run()
    return 1 if server.crashed else 0


def _simulate(arguments: argparse.Namespace) -> int:
    from coordinator.simulation.command import simulate
    from coordinator.simulation.sweep import Options, read_seeds

    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format="level=%(levelname)s %(message)s")
    options = Options(
        output=arguments.output,
        arms=tuple(arguments.arms.split(",")) if arguments.arms else None,
        seeds=read_seeds(arguments.seeds) if arguments.seeds else None,
        threads=arguments.threads,
        ray=arguments.ray,
    )
    return simulate(arguments.config, options, page_only=arguments.page)


def _status(arguments: argparse.Namespace) -> int:
    import msgspec

    from coordinator.admin.choice import OPEN
    from coordinator.admin.status import status_lines, text_of, worst

    client = _client(arguments)
    ready, runs = client.readiness(), client.list_runs()
    open_runs = [client.run(run.run_id) for run in runs if run.state in OPEN]
    ended = [run for run in runs if run.state not in OPEN][-1:]
    lines = status_lines(ready, client.devices(), [*ended, *open_runs])
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(lines), indent=2).decode())
    else:
        print(text_of(lines))
    return int(worst(lines) == "FAIL")


def _token(arguments: argparse.Namespace) -> int:
    print(_client(arguments).create_token(arguments.valid_s))
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    print(f"revoked {_client(arguments).revoke_device(arguments.name).name}")
    return 0


def _resume(arguments: argparse.Namespace) -> int:
    print(f"resumed {_client(arguments).resume_device(arguments.name).name}")
    return 0


def _list_devices(arguments: argparse.Namespace) -> int:
    import time

    import msgspec

    from coordinator.admin.report import device_table

    devices = _client(arguments).devices()
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(devices), indent=2).decode())
    elif devices:
        print(device_table(devices, time.time()))
    else:
        print("no device has enrolled; make a token with: edge-coordinator token")
    return 0


def _new_run(arguments: argparse.Namespace) -> int:
    from coordinator.admin.new_run import write_run_file

    write_run_file(
        arguments.package,
        arguments.output,
        publisher_key=arguments.publisher_key,
        evaluation_data=arguments.evaluation_data,
    )
    print(f"wrote {arguments.output}; look it through, then: edge-coordinator run create {arguments.output}")
    return 0


def _create_run(arguments: argparse.Namespace) -> int:
    from msgspec.structs import replace

    from coordinator.admin.choice import OPEN, choose_to_show
    from coordinator.config import one_visit, read_run_config

    config = read_run_config(arguments.config)
    if arguments.one_visit:
        config = one_visit(config)
    client = _client(arguments)
    if arguments.continue_from is not None:
        earlier = choose_to_show(client.list_runs(), arguments.continue_from)
        config = replace(config, continue_from=earlier.run_id)
    run_id = client.create_run(config)
    print(run_id)
    before = [run for run in client.list_runs() if run.state in OPEN and run.run_id != run_id]
    if before:
        beside = config.beside_others and all(run.config.beside_others for run in before)
        how = "goes on beside" if beside else "queued behind"
        sys.stderr.write(f"note: {how} {', '.join(f'{run.run_id} ({run.state})' for run in before)}\n")
    return 0


def _list_runs(arguments: argparse.Namespace) -> int:
    from coordinator.admin.report import headline

    for run in _client(arguments).list_runs():
        print(headline(run))
    return 0


def _show_run(arguments: argparse.Namespace) -> int:
    from coordinator.admin.report import headline, not_eligible_lines, set_aside_lines, text_table

    client = _client(arguments)
    run = client.run(_shown(arguments, client))
    print(headline(run), text_table(run), sep="\n\n")
    for line in (*set_aside_lines(run), *not_eligible_lines(run)):
        print(line)
    return 0


def _watch_run(arguments: argparse.Namespace) -> int:
    from coordinator.admin.watch import watch

    client = _client(arguments)
    return 0 if watch(client, _shown(arguments, client)).state == "finished" else 1


def _stop_run(arguments: argparse.Namespace) -> int:
    from coordinator.admin.choice import OPEN, choose_open, given_name

    client = _client(arguments)
    given = given_name(arguments.run_id, arguments.run)
    stopped = client.stop_run(choose_open(client.list_runs(), given).run_id)
    if stopped.was in OPEN:
        print(f"stopped run {stopped.run_id} ({stopped.was})")
    else:
        print(f"run {stopped.run_id} had ended before ({stopped.was}); nothing has changed")
    return 0


def _pause_run(arguments: argparse.Namespace) -> int:
    return _set_paused(arguments, paused=True)


def _resume_run(arguments: argparse.Namespace) -> int:
    return _set_paused(arguments, paused=False)


def _roll_back_run(arguments: argparse.Namespace) -> int:
    from coordinator.admin.choice import choose_open, given_name

    client = _client(arguments)
    given = given_name(arguments.run_id, arguments.run)
    run = client.roll_back_run(choose_open(client.list_runs(), given).run_id, arguments.to)
    print(
        f"run {run.run_id} stands where it stood after round {run.to}; {run.taken_back} later rounds count no more"
        if run.taken_back
        else f"run {run.run_id} has no round after {run.to}; nothing has changed"
    )
    return 0


def _set_paused(arguments: argparse.Namespace, *, paused: bool) -> int:
    from coordinator.admin.choice import choose_open, given_name

    client = _client(arguments)
    given = given_name(arguments.run_id, arguments.run)
    run = client.pause_run(choose_open(client.list_runs(), given).run_id, paused=paused)
    words = "paused" if paused else "resumed"
    print(
        f"{words} run {run.run_id}"
        if run.changed
        else f"run {run.run_id} was {words} before; nothing has changed"
    )
    return 0


def _report_run(arguments: argparse.Namespace) -> int:
    from coordinator.admin.report import write_report

    client = _client(arguments)
    run = client.run(_shown(arguments, client))
    write_report(run, client.events(run.run_id), arguments.output)
    print(f"wrote {arguments.output}: run {run.run_id} ({run.state})")
    return 0


def _fetch_slices(arguments: argparse.Namespace) -> int:
    client = _client(arguments)
    run = client.run(_shown(arguments, client))
    write_durably(arguments.output, client.slices(run.run_id))
    done = f"{run.rounds_committed} of {run.rounds_wanted} rounds"
    print(f"wrote {arguments.output}: run {run.run_id} ({run.state}, {done})")
    return 0


def _export_run(arguments: argparse.Namespace) -> int:
    from coordinator.admin.export_run import send_to_mlflow, write_events, write_tensorboard
    from edge_runtime.errors import ConfigError

    if not (arguments.events or arguments.tensorboard or arguments.mlflow):
        raise ConfigError("run export needs at least one of --events, --tensorboard and --mlflow")
    client = _client(arguments)
    run = client.run(_shown(arguments, client))
    if arguments.events:
        lines = write_events(run, client.events(run.run_id), arguments.events)
        sys.stderr.write(f"wrote {lines} lines of run {run.run_id}\n")
    if arguments.tensorboard:
        count = write_tensorboard(run, arguments.tensorboard)
        sys.stderr.write(f"wrote {count} scalars to {arguments.tensorboard / run.run_id}\n")
    if arguments.mlflow:
        sys.stderr.write(f"made run {send_to_mlflow(run, arguments.mlflow)} on {arguments.mlflow}\n")
    return 0


def _publish(arguments: argparse.Namespace) -> int:
    from coordinator.admin.release import release_line, release_request

    client = _client(arguments)
    released = client.publish(release_request(arguments, _shown(arguments, client)))
    print(f"published {release_line(released)}")
    return 0


def _list_releases(arguments: argparse.Namespace) -> int:
    import msgspec

    from coordinator.admin.release import release_list

    releases = _client(arguments).releases()
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(releases), indent=2).decode())
    else:
        print(release_list(releases))
    return 0


def _add_user(arguments: argparse.Namespace) -> int:
    from coordinator.admin.users import read_password

    password = None if arguments.password_file is None else read_password(arguments.password_file)
    token = _client(arguments).add_user(arguments.name, arguments.role, password).token
    print(f"added {arguments.name}, {arguments.role}" if token is None else token)
    return 0


def _list_users(arguments: argparse.Namespace) -> int:
    import msgspec

    from coordinator.admin.users import user_table

    users = _client(arguments).users()
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(users), indent=2).decode())
    else:
        print(user_table(users))
    return 0


def _remove_user(arguments: argparse.Namespace) -> int:
    print(f"removed {_client(arguments).remove_user(arguments.name).name}")
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    import msgspec

    from coordinator.admin.users import act_table

    acts = _client(arguments).acts(arguments.limit)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(acts), indent=2).decode())
    else:
        print(act_table(acts))
    return 0


def _shown(arguments: argparse.Namespace, client: AdminClient) -> str:
    """The run that a command looks at; where the operator left that open, the choice is told beside the output."""
    from coordinator.admin.choice import choose_to_show, given_name

    given = given_name(arguments.run_id, arguments.run)
    choice = choose_to_show(client.list_runs(), given)
    if choice.remark:
        sys.stderr.write(f"note: {choice.remark}\n")
    return choice.run_id


def _client(arguments: argparse.Namespace) -> AdminClient:
    from coordinator.admin.client import connect

    return connect(arguments.state, arguments.url, arguments.admin_token_file, arguments.ca)


if __name__ == "__main__":
    sys.exit(main())
