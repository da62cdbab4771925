"""Every option of the three command lines, and every exit code, has a test that uses it: the tables name the tests.

A row is held to by reading the test's source, with the fixtures, functions and tables of tests/ that it uses. The test
must call the command line of the program, with the words of the command and with the option; strings that are only
compared, or matched, do not count. A test of an exit code must name the code. So a new option or error class needs a
row, and a row cannot outlive its test.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_runtime import errors
from edge_runtime.errors import ArtefactError, CoordinatorError, EdgeError
from edge_runtime.exit_status import INTERRUPTED

TESTS = Path(__file__).parent
PROGRAMS = {"edge-runtime": "edge_runtime", "edge-coordinator": "coordinator", "edge-export": "export"}
#: Classes that only gather narrower ones: no command ends with their codes.
ROOTS = (CoordinatorError, ArtefactError)

DEVICE = "edge_runtime/test_cli.py::"
PLAN = "edge_runtime/profile/test_plan_command.py::"
PROFILE = "edge_runtime/profile/test_run.py::"
OPERATOR = "coordinator/test_cli.py::"
FIRST_HOUR = "field/test_first_hour_operator.py::"
SIMULATE = "coordinator/simulation/"
EXPORTED = "coordinator/admin/test_export_run.py::"
SEVERAL = "faults/test_several_coordinators.py::test_one_is_killed_and_the_database_restarts"
COPIES = "coordinator/storage/test_copies.py::"
EXPORT = "export/test_cli.py::"
JSON = "edge_runtime/test_json_output.py::"
SERVING = "edge_runtime/serving/test_command.py::"
#: Options by which predict and serve are told a model.
OF_A_MODEL = (
    *(
        "--package",
        "--publisher-key",
        "--slices",
        "--cap",
        "--threads",
        "--prepared",
    ),
    "--engine",
)
BAD_INPUT = "faults/test_bad_input.py::"

#: Tests by command and option. Options that commands share, as all that ask a coordinator do, stand under their program
#: once.
OPTIONS = {
    "edge-runtime": {"--version": DEVICE + "test_the_version_is_told"},
    "edge-runtime run": {"--config": DEVICE + "test_a_device_without_its_engine_does_not_start"},
    "edge-runtime enrol": {
        "--config": DEVICE + "test_enrol_then_status_and_check",
        "--json": JSON + "test_commands_of_a_device",
    },
    "edge-runtime check": {
        "--config": DEVICE + "test_check_goes_on_after_a_failure",
        "--json": JSON + "test_a_check_that_fails",
    },
    "edge-runtime status": {
        "--config": DEVICE + "test_status_before_enrolment_says_so",
        "--json": "edge_runtime/agent/test_status.py::test_identity_and_release_are_told",
    },
    "edge-runtime doctor": dict.fromkeys(
        ("--config", "--json"), "edge_runtime/agent/test_doctor.py::test_the_command_prints_lines_or_json"
    ),
    "edge-runtime support-bundle": {
        **dict.fromkeys(
            ("--config", "--output"),
            "edge_runtime/agent/test_support_bundle.py::test_a_broken_configuration_is_part_of_the_bundle",
        ),
        "--json": JSON + "test_commands_of_a_device",
    },
    "edge-runtime predict": {
        **dict.fromkeys(
            (*OF_A_MODEL, "--max-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--stop"),
            SERVING + "test_every_option_of_predict_is_handed_on",
        ),
        **dict.fromkeys(
            ("--config", "--data"),
            "edge_runtime/serving/test_predict.py::test_what_cannot_be_done_is_told_in_one_line",
        ),
        **dict.fromkeys(
            ("--depth", "--confidence"),
            "edge_runtime/serving/test_depth.py::test_a_text_leaves_where_it_is_told_or_where_it_is_sure",
        ),
    },
    "edge-runtime serve": {
        **dict.fromkeys(
            (*OF_A_MODEL, "--listen", "--socket"), SERVING + "test_every_option_of_serve_reaches_the_model"
        ),
        "--config": SERVING + "test_serve_without_a_release_says_what_to_do",
    },
    "edge-runtime plan": {
        "--cap": PLAN + "test_a_plan_is_printed_with_its_parts",
        "--batch": PLAN + "test_what_the_ladder_gave_up_is_told",
        "--sequence": PLAN + "test_a_plan_is_printed_with_its_parts",
        "--draws": PLAN + "test_backpropagation_is_planned_with_its_own_words",
        "--slices": PLAN + "test_what_cannot_be_planned_is_one_clear_line",
        "--update": PLAN + "test_backpropagation_is_planned_with_its_own_words",
        "--publisher-key": PLAN + "test_an_unchecked_signature_is_told_once",
        "--prepared": PLAN + "test_time_is_told_once_the_package_is_prepared",
        "--engine": PLAN + "test_a_package_is_planned_for_the_engine_that_is_named",
        "--json": JSON + "test_a_plan",
        "--what-if": PLAN + "test_other_sizes_are_tabled_with_the_chosen_one_marked",
    },
    "edge-runtime profile": {
        "--cap": PROFILE + "test_a_task_is_profiled",
        "--batch": PROFILE + "test_less_data_than_asked_for_is_told",
        "--sequence": PROFILE + "test_what_cannot_be_profiled_is_refused_before_anything_runs",
        "--draws": PROFILE + "test_a_task_is_profiled",
        "--slices": PROFILE + "test_less_data_than_asked_for_is_told",
        "--update": PROFILE + "test_backpropagation_is_profiled",
        "--publisher-key": PROFILE + "test_what_cannot_be_profiled_is_refused_before_anything_runs",
        "--prepared": PROFILE + "test_a_task_is_profiled",
        "--engine": PROFILE + "test_what_cannot_be_profiled_is_refused_before_anything_runs",
        "--data": PROFILE + "test_a_task_is_profiled",
        "--steps": PROFILE + "test_a_task_is_profiled",
        "--threads": PROFILE + "test_a_task_is_profiled",
        "--weights": PROFILE + "test_how_the_work_is_done_can_be_forced",
        "--micro-batch": PROFILE + "test_how_the_work_is_done_can_be_forced",
        "--output": PROFILE + "test_a_task_is_profiled",
        "--against": PROFILE + "test_a_report_is_compared_with_an_earlier_one",
        "--tolerance": PROFILE + "test_a_report_is_compared_with_an_earlier_one",
        "--model": PROFILE + "test_backpropagation_is_compared_where_torch_is",
        "--json": PROFILE + "test_less_data_than_asked_for_is_told",
    },
    "edge-coordinator": {
        "--state": OPERATOR + "test_every_command_asks_the_coordinator_that_is_named",
        "--url": OPERATOR + "test_every_command_asks_the_coordinator_that_is_named",
        "--admin-token-file": OPERATOR + "test_every_command_asks_the_coordinator_that_is_named",
        "--ca": FIRST_HOUR + "test_commands_on_the_same_machine_know_the_certificate",
    },
    "edge-coordinator serve": {
        "--log-format": OPERATOR + "test_log_lines_are_json_where_they_are_asked_for",
        "--state": OPERATOR + "test_killed_while_a_result_is_counted",
        "--host": OPERATOR + "test_a_server_is_bound_as_its_options_say",
        "--port": OPERATOR + "test_killed_while_a_result_is_counted",
        "--tls-cert": OPERATOR + "test_a_server_is_bound_as_its_options_say",
        "--tls-key": OPERATOR + "test_a_server_is_bound_as_its_options_say",
        "--insecure-http": OPERATOR + "test_a_server_is_bound_as_its_options_say",
        "--database": SEVERAL,
        "--blobs": SEVERAL,
        "--secrets": SEVERAL,
        "--direct-blobs": SEVERAL,
    },
    "edge-coordinator backup": {
        "--state": COPIES + "test_a_backup_of_a_living_coordinator_is_a_state_folder",
        "--output": COPIES + "test_a_backup_of_a_living_coordinator_is_a_state_folder",
        "--database": COPIES + "test_a_state_folder_moves_to_servers_and_back",
        "--blobs": COPIES + "test_a_state_folder_moves_to_servers_and_back",
        "--secrets": COPIES + "test_secrets_may_lie_elsewhere",
    },
    "edge-coordinator restore": {
        "--state": COPIES + "test_a_backup_of_a_living_coordinator_is_a_state_folder",
        "--database": COPIES + "test_a_state_folder_moves_to_servers_and_back",
        "--blobs": COPIES + "test_a_state_folder_moves_to_servers_and_back",
        "--secrets": COPIES + "test_a_state_folder_moves_to_servers_and_back",
    },
    "edge-coordinator migrate": {
        "--state": COPIES + "test_a_state_folder_moves_to_servers_and_back",
        "--database": COPIES + "test_a_state_folder_moves_to_servers_and_back",
        "--blobs": COPIES + "test_a_state_folder_moves_to_servers_and_back",
        "--secrets": COPIES + "test_secrets_may_lie_elsewhere",
    },
    "edge-coordinator simulate": {
        "--output": SIMULATE
        + "report/test_comparison.py::test_the_command_prints_the_table_and_writes_the_page",
        "--arms": SIMULATE
        + "report/test_comparison.py::test_the_command_prints_the_table_and_writes_the_page",
        "--seeds": SIMULATE
        + "report/test_comparison.py::test_the_command_prints_the_table_and_writes_the_page",
        "--threads": SIMULATE
        + "report/test_comparison.py::test_the_command_prints_the_table_and_writes_the_page",
        "--ray": SIMULATE + "test_ray_trainer.py::test_without_ray_the_message_says_how_to_install_it",
        "--page": SIMULATE
        + "report/test_comparison.py::test_the_command_prints_the_table_and_writes_the_page",
    },
    "edge-coordinator token": {"--valid-s": OPERATOR + "test_a_token_is_valid_as_long_as_it_says"},
    "edge-coordinator device revoke": {"": OPERATOR + "test_a_run_from_the_command_line"},
    "edge-coordinator device resume": {"": FIRST_HOUR + "test_devices_are_listed"},
    "edge-coordinator device list": {"--json": FIRST_HOUR + "test_devices_are_listed"},
    "edge-coordinator run new": {
        "--publisher-key": FIRST_HOUR + "test_a_new_user_gets_from_package_to_run",
        "--evaluation-data": FIRST_HOUR + "test_a_new_user_gets_from_package_to_run",
        "--output": FIRST_HOUR + "test_a_new_user_gets_from_package_to_run",
    },
    "edge-coordinator run create": {
        "--one-visit": "end_to_end/test_one_visit.py::test_a_fleet_learns_in_one_visit",
        "--continue-from": "end_to_end/test_one_visit.py::test_a_fleet_learns_in_one_visit",
    },
    "edge-coordinator release publish": dict.fromkeys(
        ("--run", "--round", "--lowest-accuracy", "--highest-loss", "--each-round"),
        OPERATOR + "test_a_release_is_asked_for_and_listed",
    ),
    "edge-coordinator release list": {"--json": OPERATOR + "test_a_release_is_asked_for_and_listed"},
    "edge-coordinator user add": dict.fromkeys(
        ("--role", "--password-file"), OPERATOR + "test_users_are_added_listed_and_removed"
    ),
    "edge-coordinator user list": {"--json": OPERATOR + "test_users_are_added_listed_and_removed"},
    "edge-coordinator user remove": {"": OPERATOR + "test_users_are_added_listed_and_removed"},
    "edge-coordinator audit": dict.fromkeys(
        ("--limit", "--json"), OPERATOR + "test_users_are_added_listed_and_removed"
    ),
    "edge-coordinator run list": {"": OPERATOR + "test_a_run_from_the_command_line"},
    "edge-coordinator run show": {"--run": OPERATOR + "test_a_run_is_named_with_and_without_the_option"},
    "edge-coordinator run watch": {"--run": OPERATOR + "test_a_run_is_named_with_and_without_the_option"},
    "edge-coordinator run stop": {"--run": OPERATOR + "test_a_run_is_named_with_and_without_the_option"},
    "edge-coordinator run pause": {"--run": OPERATOR + "test_a_run_is_named_with_and_without_the_option"},
    "edge-coordinator run resume": {"--run": OPERATOR + "test_a_run_is_named_with_and_without_the_option"},
    "edge-coordinator run rollback": {
        "--run": OPERATOR + "test_a_run_is_named_with_and_without_the_option",
        "--to": OPERATOR + "test_a_run_is_named_with_and_without_the_option",
    },
    "edge-coordinator run report": {
        "--run": OPERATOR + "test_a_run_is_named_with_and_without_the_option",
        "--output": OPERATOR + "test_a_run_from_the_command_line",
    },
    "edge-coordinator run fetch-slices": {
        "--run": OPERATOR + "test_a_run_is_named_with_and_without_the_option",
        "--output": OPERATOR + "test_a_run_from_the_command_line",
    },
    "edge-coordinator status": {
        "--json": "coordinator/admin/test_status.py::test_a_silent_fleet_fails",
    },
    "edge-coordinator run export": {
        "--run": EXPORTED + "test_events_are_one_object_a_line",
        "--events": EXPORTED + "test_events_are_one_object_a_line",
        "--tensorboard": "coordinator/admin/test_event_file.py::"
        + "test_scalars_are_read_back_from_the_event_file",
        "--mlflow": EXPORTED + "test_a_tracking_server_gets_a_run",
    },
    "edge-export package": dict.fromkeys(
        (
            *("--task", "--labels", "--check-data", "--output", "--key", "--slice", "--rank", "--alpha"),
            *("--density", "--mask", "--factors", "--mlp-topk"),
            *("--targets", "--sequence-limit", "--quant", "--with-adjoint", "--engine", "--seed"),
            *("--adapter", "--trust-remote-code", "--with-generation"),
        ),
        EXPORT + "test_every_option_reaches_the_export",
    ),
    "edge-export key": {"": EXPORT + "test_a_key_is_made_once"},
    "edge-export adapter": dict.fromkeys(
        ("--slices", "--publisher-key", "--rank", "--base-model", "--output"),
        "export/adapters/test_merge.py::test_the_commands_write_what_the_functions_write",
    ),
    "edge-export merge": dict.fromkeys(
        ("--slices", "--publisher-key", "--rank", "--output"),
        "export/adapters/test_merge.py::test_the_commands_write_what_the_functions_write",
    ),
    "edge-export cut": dict.fromkeys(
        ("--rank", "--slices", "--publisher-key", "--key", "--output"),
        "export/packaging/test_cut_package.py::test_the_command_cuts_a_package_and_what_was_trained",
    ),
    "edge-export onnx": {
        "--output": "export/adapters/test_onnx_model.py::test_onnxruntime_alone_predicts_what_the_package_predicts"
    },
    "edge-export llama2c": {"--output": "export/llama2c/test_convert.py::test_nothing_is_overwritten"},
}
#: Tests by exit code: each ends a command with it.
EXIT_CODES = {
    1: SIMULATE + "report/test_comparison.py::test_a_failed_arm_tells_by_the_exit_code",
    2: DEVICE + "test_a_command_is_needed",
    10: DEVICE + "test_check_finds_limits_that_cannot_hold",
    11: DEVICE + "test_an_error_is_one_line_and_an_exit_code",
    12: DEVICE + "test_check_goes_on_after_a_failure",
    13: PLAN + "test_a_cap_that_nothing_fits_names_the_cap_that_would",
    14: PROFILE + "test_what_ends_the_worker_ends_the_command",
    15: PROFILE + "test_what_ends_the_worker_ends_the_command",
    16: PLAN + "test_what_cannot_be_planned_is_one_clear_line",
    17: PROFILE + "test_what_ends_the_worker_ends_the_command",
    18: PROFILE + "test_a_report_is_compared_with_an_earlier_one",
    19: OPERATOR + "test_trouble_that_passes_has_a_code_of_its_own",
    21: DEVICE + "test_an_unreachable_coordinator_has_its_own_exit_code",
    22: OPERATOR + "test_refusals_reach_the_operator",
    23: FIRST_HOUR + "test_something_else_that_answers_is_told",
    31: BAD_INPUT + "test_exporter_refuses",
    32: PLAN + "test_a_folder_that_is_no_package_is_named",
    33: BAD_INPUT + "test_adapter_is_refused",
    34: PROFILE + "test_a_damaged_package_is_refused",
    35: PLAN + "test_what_cannot_be_planned_is_one_clear_line",
    36: EXPORT + "test_slices_of_another_run_are_refused",
    INTERRUPTED: DEVICE + "test_an_interrupted_command_says_so_to_the_shell",
}


# --- what the programs offer ------------------------------------------------------------------------------------


@functools.cache
def commands() -> dict[str, dict[str, argparse.Action]]:
    """The options of every command, with the parser's object for each; shared objects stand under their program."""
    found: dict[str, dict[str, argparse.Action]] = {}
    for program, folder in PROGRAMS.items():
        found |= _options(importlib.import_module(f"{folder}.cli").build_parser(), program)
    count: dict[int, int] = {}
    for options in found.values():
        for action in options.values():
            count[id(action)] = count.get(id(action), 0) + 1
    for words in list(found):
        for option, action in list(found[words].items()):
            if count[id(action)] > 1:
                found.setdefault(words.split()[0], {})[option] = found[words].pop(option)
    return found


def _options(parser: argparse.ArgumentParser, words: str) -> dict[str, dict[str, argparse.Action]]:
    found: dict[str, dict[str, argparse.Action]] = {words: {}}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found |= _options(sub, f"{words} {name}")
            if not found[words]:
                del found[words]
        elif action.option_strings and action.dest != "help":
            found[words][action.option_strings[-1]] = action
    return found


# --- what a test uses -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A file of tests/.

    Attributes:
        path: the file.
        defined: what stands on its outermost level, by name.
        imported: modules that names of the file are from, and the names there; None for a module itself.
    """

    path: Path
    defined: dict[str, ast.stmt]
    imported: dict[str, tuple[str, str | None]]


@functools.cache
def read_source(path: Path) -> Source:
    """Parse a file."""
    defined: dict[str, ast.stmt] = {}
    imported: dict[str, tuple[str, str | None]] = {}
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                defined |= {name.id: node for name in ast.walk(target) if isinstance(name, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                imported[alias.asname or alias.name] = (node.module, alias.name)
    return Source(path, defined, imported)


@functools.cache
def used_by(test: str) -> frozenset[object]:
    """Words, numbers and dotted names that a test uses, itself and through fixtures, functions and tables of tests/.

    Raises:
        LookupError: there is no such test.
    """
    file, _, name = test.partition("::")
    source = read_source(TESTS / file)
    if name not in source.defined:
        raise LookupError(f"there is no test {test}")
    found: set[object] = set()
    seen: set[tuple[Path, str]] = set()
    waiting = [(source, name)]
    while waiting:
        source, name = waiting.pop()
        if (source.path, name) in seen:
            continue
        seen.add((source.path, name))
        if name in source.defined:
            for item in _items(source.defined[name]):
                found.add(item)
                if isinstance(item, str) and item.isidentifier():
                    waiting.append((source, item))
        elif name in source.imported:
            module, theirs = source.imported[name]
            found |= {module, f"{module}.{theirs}"}
            for path, inner in ((_file(module), theirs), (_file(f"{module}.{theirs}"), None)):
                if path is not None and path.is_file():
                    other = read_source(path)
                    waiting += [(other, each) for each in ([inner] if inner else other.defined)]
        else:
            waiting += [
                (read_source(folder / "conftest.py"), name)
                for folder in source.path.parents
                if (folder / "conftest.py").is_file() and name in read_source(folder / "conftest.py").defined
            ]
    return frozenset(found)


def _file(module: str) -> Path | None:
    inside = module.startswith("tests.") or module == "tests"
    return TESTS.parent / f"{module.replace('.', '/')}.py" if inside else None


def _items(node: ast.AST, *, compared: bool = False) -> Iterator[object]:
    """Constants and names of a piece of source; no documentation, and no strings that are only compared or matched."""
    if isinstance(node, ast.Constant):
        if not (compared and isinstance(node.value, str)):
            yield node.value
    elif isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.Attribute):
        yield f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else node.attr
    literal = isinstance(node, ast.Tuple | ast.List | ast.Set | ast.JoinedStr)
    for child in ast.iter_child_nodes(node):
        documented = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        matched = isinstance(child, ast.keyword) and child.arg == "match"
        if not documented and not matched:
            yield from _items(child, compared=isinstance(node, ast.Compare) or (compared and literal))


def uses(test: str, words: str, option: str) -> bool:
    """Whether a test calls a command with an option."""
    program, *rest = words.split()
    found = used_by(test)
    given = {word.partition("=")[0] for item in found if isinstance(item, str) for word in item.split()}
    return _calls(found, program) and {*rest, *([option] if option else [])} <= given


def _calls(found: frozenset[object], program: str) -> bool:
    return bool({f"{PROGRAMS[program]}.cli", f"{PROGRAMS[program]}.cli.main"} & found)


# --- the tests --------------------------------------------------------------------------------------------------

ROWS = [(words, option, test) for words, row in OPTIONS.items() for option, test in row.items()]


def test_every_option_has_a_row() -> None:
    """The table has every command and every option of the three programs, and no other."""
    assert {words: set(row) - {""} for words, row in OPTIONS.items()} == {
        words: set(options) for words, options in commands().items()
    }


@pytest.mark.parametrize(("words", "option", "test"), ROWS, ids=[f"{row[0]} {row[1]}" for row in ROWS])
def test_every_option_is_used_by_the_test_of_its_row(words: str, option: str, test: str) -> None:
    """The test that a row names calls that command with that option."""
    assert uses(test, words, option), f"{test} does not call {words} with {option}"


def test_every_exit_code_has_a_row() -> None:
    """Every error class has a test of its exit code, but for those that no command raises; so have 2 and 130."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EdgeError)]
    assert set(EXIT_CODES) == {2, INTERRUPTED, *(kind.exit_code for kind in kinds if kind not in ROOTS)}


@pytest.mark.parametrize(("code", "test"), EXIT_CODES.items())
def test_every_exit_code_is_met_by_the_test_of_its_row(code: int, test: str) -> None:
    """The test that a row names calls a command line and names the code."""
    found = used_by(test)
    names = {
        f"{kind.__name__}.exit_code"
        for kind in vars(errors).values()
        if getattr(kind, "exit_code", 0) == code
    }
    assert any(_calls(found, program) for program in PROGRAMS)
    assert code in found or names & found, f"{test} does not name {code}"


def test_roots_end_no_command() -> None:
    """Classes that gather others are raised nowhere but in simulations, which count it as a failed arm."""
    for folder in PROGRAMS.values():
        for path in sorted((TESTS.parent / folder).rglob("*.py")):
            if path != TESTS.parent / "coordinator/simulation/verdict.py":
                assert not any(f"raise {kind.__name__}(" in path.read_text() for kind in ROOTS), path


def test_a_row_that_is_not_true_is_found() -> None:
    """A test that does not use the option, or that only compares it, does not satisfy its row; nor does a lost one."""
    version = OPTIONS["edge-runtime"]["--version"]
    assert uses(version, "edge-runtime", "--version")
    assert not uses(version, "edge-runtime", "--config")
    assert not uses(version, "edge-export", "--version")
    compared = PLAN + "test_backpropagation_is_planned_with_its_own_words"
    assert "--with-adjoint" in (TESTS / PLAN.removesuffix("::")).read_text()
    assert not uses(compared, "edge-runtime plan", "--with-adjoint")
    with pytest.raises(LookupError, match="there is no test"):
        used_by(DEVICE + "test_that_was_renamed")
