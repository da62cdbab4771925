"""Rules that hold for the whole tree: which folder may import which, what is tested, and what pages may name."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_FILES = {
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "executorch.txt",
    "pyproject.toml",
    "torch.txt",
}
PROGRAMS = ("edge_runtime", "export", "coordinator")
COMMANDS = ("cli.py", "command.py")
#: Each folder and the folders that its modules may import. A program's own folder means the modules at its root.
#: Commands (``cli.py``, ``command.py``) have rows of their own: they stand on top of their folder. A row may name only
#: rows above it, so imports cannot go in a circle.
MAY_IMPORT: dict[str, set[str]] = {
    "edge_runtime": set(),
    "edge_runtime/html": {"edge_runtime"},
    "edge_runtime/protocol": {"edge_runtime"},
    "edge_runtime/masking": {"edge_runtime", "edge_runtime/protocol"},
    "edge_runtime/engines": {"edge_runtime"},
    "edge_runtime/data": {"edge_runtime"},
    "edge_runtime/slices": set(),
    "edge_runtime/package": {
        "edge_runtime",
        "edge_runtime/engines",
        "edge_runtime/protocol",
        "edge_runtime/slices",
    },
    "edge_runtime/memory": {"edge_runtime", "edge_runtime/package", "edge_runtime/protocol"},
    "edge_runtime/execution": {
        "edge_runtime",
        "edge_runtime/data",
        "edge_runtime/engines",
        "edge_runtime/memory",
        "edge_runtime/package",
    },
    "edge_runtime/training": {
        "edge_runtime",
        "edge_runtime/data",
        "edge_runtime/engines",
        "edge_runtime/execution",
        "edge_runtime/memory",
        "edge_runtime/package",
        "edge_runtime/protocol",
        "edge_runtime/slices",
    },
    "edge_runtime/inference": {
        "edge_runtime",
        "edge_runtime/data",
        "edge_runtime/execution",
        "edge_runtime/package",
        "edge_runtime/protocol",
    },
    "edge_runtime/worker": {
        "edge_runtime",
        "edge_runtime/data",
        "edge_runtime/engines",
        "edge_runtime/execution",
        "edge_runtime/inference",
        "edge_runtime/memory",
        "edge_runtime/package",
        "edge_runtime/protocol",
        "edge_runtime/training",
    },
    "edge_runtime/agent": {
        "edge_runtime",
        "edge_runtime/data",
        "edge_runtime/engines",
        "edge_runtime/masking",
        "edge_runtime/memory",
        "edge_runtime/package",
        "edge_runtime/protocol",
        "edge_runtime/training",
        "edge_runtime/worker",
    },
    "edge_runtime/serving": {
        "edge_runtime",
        "edge_runtime/agent",
        "edge_runtime/data",
        "edge_runtime/engines",
        "edge_runtime/html",
        "edge_runtime/inference",
        "edge_runtime/memory",
        "edge_runtime/package",
        "edge_runtime/protocol",
        "edge_runtime/worker",
    },
    "edge_runtime/serving/command.py": {
        "edge_runtime",
        "edge_runtime/agent",
        "edge_runtime/inference",
        "edge_runtime/serving",
    },
    "edge_runtime/profile": {
        "edge_runtime",
        "edge_runtime/data",
        "edge_runtime/engines",
        "edge_runtime/html",
        "edge_runtime/memory",
        "edge_runtime/package",
        "edge_runtime/protocol",
        "edge_runtime/worker",
    },
    "edge_runtime/cli.py": {
        "edge_runtime",
        "edge_runtime/agent",
        "edge_runtime/engines",
        "edge_runtime/profile",
        "edge_runtime/serving/command.py",
    },
    "export/llama2c": {"edge_runtime"},
    "export/slices": {"edge_runtime", "edge_runtime/package", "edge_runtime/slices"},
    "export/model": {"edge_runtime", "edge_runtime/data", "edge_runtime/package", "export/slices"},
    "export/capture": {"edge_runtime", "export/model"},
    "export/quantisation": {"edge_runtime/package", "export/capture", "export/model"},
    "export/autodiff": {"edge_runtime", "export/model", "export/quantisation"},
    "export/lowering": {
        "edge_runtime",
        "edge_runtime/engines",
        "edge_runtime/memory",
        "edge_runtime/package",
        "export/autodiff",
        "export/capture",
        "export/model",
        "export/quantisation",
        "export/slices",
    },
    "export/adapters": {
        "edge_runtime",
        "edge_runtime/execution",
        "edge_runtime/package",
        "edge_runtime/slices",
        "export/model",
        "export/quantisation",
        "export/slices",
    },
    "export/packaging": {
        "edge_runtime",
        "edge_runtime/data",
        "edge_runtime/engines",
        "edge_runtime/execution",
        "edge_runtime/package",
        "edge_runtime/protocol",
        "edge_runtime/training",
        "export/adapters",
        "export/capture",
        "export/lowering",
        "export/model",
        "export/quantisation",
        "export/slices",
    },
    "export": {
        "edge_runtime",
        "edge_runtime/data",
        "edge_runtime/memory",
        "edge_runtime/package",
        "edge_runtime/profile",
        "export/model",
        "export/slices",
    },
    "export/cli.py": {
        "edge_runtime",
        "edge_runtime/data",
        "edge_runtime/engines",
        "edge_runtime/memory",
        "edge_runtime/package",
        "edge_runtime/protocol",
        "edge_runtime/slices",
        "export/adapters",
        "export/llama2c",
        "export/model",
        "export/packaging",
        "export/slices",
    },
    "coordinator/storage": {"edge_runtime", "edge_runtime/package", "edge_runtime/protocol"},
    "coordinator/monitoring": {"edge_runtime", "coordinator/storage"},
    "coordinator": {
        "edge_runtime",
        "edge_runtime/package",
        "edge_runtime/protocol",
        "edge_runtime/training",
        "coordinator/storage",
    },
    "coordinator/aggregation": {
        "edge_runtime",
        "edge_runtime/masking",
        "edge_runtime/package",
        "edge_runtime/slices",
        "edge_runtime/training",
        "coordinator",
    },
    "coordinator/rounds": {
        "edge_runtime",
        "edge_runtime/data",
        "edge_runtime/masking",
        "edge_runtime/memory",
        "edge_runtime/package",
        "edge_runtime/protocol",
        "edge_runtime/slices",
        "edge_runtime/training",
        "edge_runtime/worker",
        "coordinator",
        "coordinator/aggregation",
        "coordinator/storage",
    },
    "coordinator/dashboard": {
        "edge_runtime",
        "edge_runtime/html",
        "edge_runtime/package",
        "edge_runtime/protocol",
        "coordinator",
        "coordinator/rounds",
        "coordinator/storage",
    },
    "coordinator/api": {
        "edge_runtime",
        "edge_runtime/html",
        "edge_runtime/protocol",
        "coordinator",
        "coordinator/monitoring",
        "coordinator/dashboard",
        "coordinator/rounds",
        "coordinator/storage",
    },
    "coordinator/admin": {
        "edge_runtime",
        "edge_runtime/html",
        "edge_runtime/package",
        "edge_runtime/protocol",
        "coordinator",
        "coordinator/api",
        "coordinator/monitoring",
        "coordinator/rounds",
    },
    "coordinator/simulation": {
        "edge_runtime",
        "edge_runtime/agent",
        "edge_runtime/data",
        "edge_runtime/engines",
        "edge_runtime/execution",
        "edge_runtime/memory",
        "edge_runtime/package",
        "edge_runtime/protocol",
        "edge_runtime/training",
        "edge_runtime/worker",
        "coordinator",
        "coordinator/rounds",
        "coordinator/storage",
    },
    "coordinator/simulation/report": {
        "edge_runtime",
        "edge_runtime/html",
        "edge_runtime/package",
        "coordinator/rounds",
        "coordinator/simulation",
        "coordinator/storage",
    },
    "coordinator/simulation/command.py": {
        "edge_runtime",
        "coordinator/simulation",
        "coordinator/simulation/report",
    },
    "coordinator/cli.py": {
        "edge_runtime",
        "coordinator",
        "coordinator/admin",
        "coordinator/api",
        "coordinator/monitoring",
        "coordinator/simulation",
        "coordinator/simulation/command.py",
        "coordinator/storage",
    },
}
#: What a device idles with, counts with or only hands on needs no arrays; an engine is loaded by its own folder alone.
#: Modules within a folder that are free of numpy though the folder is not: tests/edge_runtime/test_imports.py.
FENCES = {
    "numpy": {
        "edge_runtime",
        "edge_runtime/agent",
        "edge_runtime/cli.py",
        "edge_runtime/html",
        "edge_runtime/masking",
        "edge_runtime/memory",
        "edge_runtime/profile",
        "edge_runtime/protocol",
        "edge_runtime/serving",
        "edge_runtime/serving/command.py",
        "edge_runtime/worker",
        "coordinator",
        "coordinator/admin",
        "coordinator/api",
        "coordinator/cli.py",
        "coordinator/monitoring",
        "coordinator/dashboard",
        "coordinator/storage",
        "export/cli.py",
    },
    "torch": {folder for folder in MAY_IMPORT if not folder.startswith("export")} | {"export/llama2c"},
    "transformers": {folder for folder in MAY_IMPORT if not folder.startswith("export")}
    | {"export/autodiff", "export/capture", "export/llama2c", "export/lowering", "export/quantisation"},
    # A model that is written for other readers is run as they will run it (export/adapters/onnx_model.py).
    "onnxruntime": set(MAY_IMPORT) - {"edge_runtime/engines", "export/adapters"},
    # A device's rows may lie in a database, which edge_runtime/data/tables.py reads.
    "sqlite3": {folder for folder in MAY_IMPORT if not folder.startswith("coordinator")}
    - {"edge_runtime/data"},
}
#: Modules without a test file of their own name: other tests exercise them. The list may only get shorter.
WITHOUT_TEST_FILE = {
    "coordinator/admin/client.py",
    "coordinator/admin/report.py",
    "coordinator/api/admin_api.py",
    "coordinator/api/app.py",
    "coordinator/api/app_state.py",
    "coordinator/api/middleware.py",
    "coordinator/api/serve.py",
    "coordinator/api/traffic.py",
    "coordinator/auth.py",
    "coordinator/events.py",
    "coordinator/refusals.py",
    "coordinator/rounds/deltas.py",
    "coordinator/rounds/evaluation.py",
    "coordinator/rounds/runs.py",
    "coordinator/rounds/summary.py",
    "coordinator/rounds/tasks.py",
    "coordinator/simulation/arm.py",
    "coordinator/simulation/command.py",
    "coordinator/simulation/cost.py",
    "coordinator/simulation/kept_prefixes.py",
    "coordinator/simulation/kept_programs.py",
    "coordinator/simulation/labelled_rows.py",
    "coordinator/simulation/packages.py",
    "coordinator/simulation/record.py",
    "coordinator/simulation/report/curves.py",
    "coordinator/simulation/report/page.py",
    "coordinator/simulation/report/table.py",
    "coordinator/simulation/sweep.py",
    "coordinator/simulation/trainers.py",
    "coordinator/simulation/verdict.py",
    "coordinator/storage/blob_store.py",
    "coordinator/storage/checkpoint_rows.py",
    "coordinator/storage/device_rows.py",
    "coordinator/storage/evaluation_rows.py",
    "coordinator/storage/event_rows.py",
    "coordinator/storage/masking_rows.py",
    "coordinator/storage/migrations.py",
    "coordinator/storage/privacy_rows.py",
    "coordinator/storage/protecting_rows.py",
    "coordinator/storage/release_rows.py",
    "coordinator/storage/result_rows.py",
    "coordinator/storage/round_rows.py",
    "coordinator/storage/run_rows.py",
    "coordinator/storage/simulation_rows.py",
    "coordinator/storage/slot_rows.py",
    "coordinator/storage/task_rows.py",
    "coordinator/storage/token_rows.py",
    "edge_runtime/agent/blob_cache.py",
    "edge_runtime/agent/check.py",
    "edge_runtime/agent/decisions.py",
    "edge_runtime/agent/downloads.py",
    "edge_runtime/agent/enrolment.py",
    "edge_runtime/data/examples.py",
    "edge_runtime/durable.py",
    "edge_runtime/engines/choice.py",
    "edge_runtime/engines/engine.py",
    "edge_runtime/engines/names.py",
    "edge_runtime/execution/flow.py",
    "edge_runtime/execution/layout.py",
    "edge_runtime/exit_status.py",
    "edge_runtime/html/style.py",
    "edge_runtime/html/svg.py",
    "edge_runtime/inference/classify.py",
    "edge_runtime/inference/requests.py",
    "edge_runtime/log.py",
    "edge_runtime/memory/cgroups.py",
    "edge_runtime/package/package.py",
    "edge_runtime/package/prepared.py",
    "edge_runtime/profile/assemble.py",
    "edge_runtime/profile/charts.py",
    "edge_runtime/profile/comparisons.py",
    "edge_runtime/profile/facts.py",
    "edge_runtime/profile/identity.py",
    "edge_runtime/profile/measure.py",
    "edge_runtime/profile/plan_text.py",
    "edge_runtime/profile/request.py",
    "edge_runtime/serving/openapi.py",
    "edge_runtime/slices/kind.py",
    "edge_runtime/slices/lora.py",
    "edge_runtime/slices/lora_xs.py",
    "edge_runtime/slices/rows.py",
    "edge_runtime/slices/sparse.py",
    "edge_runtime/training/estimators.py",
    "edge_runtime/training/evaluation.py",
    "edge_runtime/training/exact_gradient.py",
    "edge_runtime/training/forward_mode.py",
    "edge_runtime/training/head_only.py",
    "edge_runtime/training/philox.py",
    "edge_runtime/training/step.py",
    "edge_runtime/training/trainable.py",
    "edge_runtime/training/zero_order.py",
    "edge_runtime/worker/inference_jobs.py",
    "edge_runtime/worker/jobs.py",
    "edge_runtime/worker/memory_breakdown.py",
    "edge_runtime/worker/session.py",
    "export/adapters/peft_names.py",
    "export/adapters/start_values.py",
    "export/autodiff/adjoint.py",
    "export/autodiff/dual_rules_closed.py",
    "export/capture/cut.py",
    "export/capture/record.py",
    "export/capture/segment.py",
    "export/llama2c/tokenizer.py",
    "export/lowering/executorch_library.py",
    "export/lowering/executorch_passes.py",
    "export/lowering/quiet.py",
    "export/lowering/trace.py",
    "export/lowering/write_executorch.py",
    "export/model/folder.py",
    "export/model/heads.py",
    "export/model/load.py",
    "export/model/slices.py",
    "export/packaging/programs.py",
    "export/packaging/torch_reference.py",
    "export/packaging/weights.py",
    "export/quantisation/stored.py",
    "export/slices/lora.py",
    "export/slices/sliced_linear.py",
    "export/torch_baseline.py",
}
#: How a page or a docstring names a file of the repository.
NAMED_PATH = re.compile(
    r"(?<![\w/.-])((?:edge_runtime|export|coordinator|benchmarks|tests|examples|docs|devices)"
    r"(?:/[\w.-]+)*/[\w-]+\.(?:py|md|toml|json|txt|svg|service|csv))\b"
)
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def place_of(path: Path) -> str:
    """The row of the table that a module belongs to."""
    inside = path.relative_to(ROOT)
    return str(inside if path.name in COMMANDS else inside.parent)


def imports_of(path: Path) -> Iterator[str]:
    """Modules and packages that a file imports, anywhere in it, by dotted name."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if (ROOT / Path(*inner.split("."))).with_suffix(".py").is_file() else node.module


def upward_imports(path: Path, place: str) -> list[str]:
    """What a module imports that its folder may not."""
    wrong = []
    for name in imports_of(path):
        if name.split(".")[0] in PROGRAMS:
            module = (ROOT / Path(*name.split("."))).with_suffix(".py")
            imported = place_of(module) if module.is_file() else name.replace(".", "/")
            if imported != place and imported not in MAY_IMPORT[place]:
                wrong.append(name)
    return wrong


def modules_of(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


MODULES = [path for path in modules_of(*PROGRAMS) if path.name != "__init__.py"]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "devices/**/*.md")
    for path in ROOT.glob(pattern)
)


def test_the_table_has_every_folder_and_no_circle() -> None:
    """Each folder with modules has a row, each row a folder, and rows name only rows above them."""
    assert set(MAY_IMPORT) == {place_of(path) for path in MODULES}
    above: set[str] = set()
    for folder, allowed in MAY_IMPORT.items():
        assert allowed <= above, (folder, allowed - above)
        above.add(folder)


@pytest.mark.parametrize("place", sorted(MAY_IMPORT))
def test_imports_point_one_way(place: str) -> None:
    """No module imports a folder that the table does not give to its own."""
    found = {path: upward_imports(path, place) for path in MODULES if place_of(path) == place}
    assert not {path: wrong for path, wrong in found.items() if wrong}


@pytest.mark.parametrize("place", sorted(MAY_IMPORT))
def test_a_row_allows_nothing_that_is_not_used(place: str) -> None:
    """A folder that a row names is imported by some module of it, so that the table tells what is so."""
    used = set()
    for path in (path for path in MODULES if place_of(path) == place):
        for name in imports_of(path):
            module = (ROOT / Path(*name.split("."))).with_suffix(".py")
            used.add(place_of(module) if module.is_file() else name.replace(".", "/"))
    assert MAY_IMPORT[place] <= used, MAY_IMPORT[place] - used


def test_a_planted_upward_import_is_found(tmp_path: Path) -> None:
    """A module of the ground floor that reached for the agent would be refused, wherever in it the import stands."""
    planted = tmp_path / "planted.py"
    planted.write_text(
        "def late():\n    from edge_runtime.agent.daemon import Agent\n    import coordinator.config\n"
    )
    assert upward_imports(planted, "edge_runtime/protocol") == [
        "edge_runtime.agent.daemon",
        "coordinator.config",
    ]


@pytest.mark.parametrize("library", sorted(FENCES))
def test_libraries_stay_behind_their_fences(library: str) -> None:
    """No module of a fenced folder imports the library, at the top or later."""
    inside = [path for path in MODULES if place_of(path) in FENCES[library]]
    assert not [path for path in inside if any(name.split(".")[0] == library for name in imports_of(path))]


def test_a_package_runs_nothing_when_it_is_imported() -> None:
    """Every ``__init__.py`` holds one docstring, and the runtime's its version."""
    for path in modules_of(*PROGRAMS, "benchmarks"):
        if path.name == "__init__.py":
            docstring, *rest = ast.parse(path.read_text("utf-8")).body
            assert isinstance(docstring, ast.Expr), path
            assert [ast.unparse(each).partition(" = ")[0] for each in rest] in ([], ["__version__"]), path


def test_every_module_has_a_test_file_or_is_known_to_lack_one() -> None:
    """Modules without ``tests/…/test_NAME.py`` are those of the list, which loses a name whenever one gets its file."""
    lacking = {
        str(path.relative_to(ROOT))
        for path in MODULES
        if not (ROOT / "tests" / path.relative_to(ROOT).parent / f"test_{path.name}").is_file()
    }
    assert lacking == WITHOUT_TEST_FILE, (lacking - WITHOUT_TEST_FILE, WITHOUT_TEST_FILE - lacking)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_pages_lead_somewhere(page: Path) -> None:
    """Every link within the repository is to a file or folder that exists."""
    links = LINK.findall(page.read_text("utf-8"))
    assert not [target for target, _ in links if not (page.parent / target).exists()]


def test_paths_that_are_named_exist() -> None:
    """A file that a page, a docstring or a comment names is in the repository."""
    named = {
        (str(path.relative_to(ROOT)), match)
        for path in [*PAGES, *modules_of(*PROGRAMS, "benchmarks", "examples")]
        if path.name != "CHANGELOG.md"  # tells of files that are gone
        for match in NAMED_PATH.findall(path.read_text("utf-8"))
        if "NAME." not in match  # a placeholder
    }
    assert not sorted((page, name) for page, name in named if not (ROOT / name).exists())


def test_every_test_says_what_it_shows() -> None:
    """Every test has a docstring of one sentence that starts with a capital and ends with a full stop."""
    missing = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                text = ast.get_docstring(node) or ""
                if not (text and text.rstrip().endswith(".")):
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not missing, missing


def test_no_file_is_a_drawer_for_everything() -> None:
    """No module is called utils, helpers, common or misc."""
    assert not {path.stem for path in MODULES} & {"utils", "helpers", "common", "misc"}


def test_the_top_folder_holds_no_scraps() -> None:
    """Files beside the programs are those that CONTRIBUTING.md or a tool asks for by name."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    at_top = {name for name in tracked.split("\0") if name and "/" not in name}
    assert at_top == TOP_FILES


def test_whoever_decodes_catches_all_that_a_decoder_raises() -> None:
    """No program catches msgspec's own error alone: invalid UTF-8 and deep nesting raise others."""
    narrow = re.compile(r"except[^\n]*\b(DecodeError|UnicodeDecodeError, RecursionError)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for program in PROGRAMS
        for path in sorted((ROOT / program).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if narrow.search(line) and "except UnicodeDecodeError" not in line
    ]
    assert not found, f"catch edge_runtime.decoding.MALFORMED instead: {found}"


def test_the_repository_names_no_package_index() -> None:
    """Pinned files hold names, versions and hashes, and no address to fetch them from."""
    for name in (
        "constraints.txt",
        "torch.txt",
        "examples/banking77/model.txt",
        "pyproject.toml",
        "Makefile",
    ):
        text = (ROOT / name).read_text()
        assert "://" not in text, name
        assert "index-url" not in text.replace("--no-emit-index-url", ""), name
