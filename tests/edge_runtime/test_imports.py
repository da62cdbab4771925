import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "edge_runtime"
MODULES = sorted(
    ".".join(("edge_runtime", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
#: What the agent is made of, and therefore what must stay small.
AGENT_MODULES = [
    "edge_runtime.agent.daemon",
    "edge_runtime.profile.request",
    "edge_runtime.agent.blob_cache",
    "edge_runtime.agent.check",
    "edge_runtime.cli",
    "edge_runtime.agent.client",
    "edge_runtime.agent.config",
    "edge_runtime.agent.decisions",
    "edge_runtime.durable",
    "edge_runtime.agent.enrolment",
    "edge_runtime.agent.doctor",
    "edge_runtime.agent.downloads",
    "edge_runtime.agent.host",
    "edge_runtime.agent.status",
    "edge_runtime.agent.support_bundle",
    "edge_runtime.agent.release",
    "edge_runtime.errors",
    "edge_runtime.worker.jobs",
    "edge_runtime.worker.inference_jobs",
    "edge_runtime.inference.requests",
    "edge_runtime.serving.command",
    "edge_runtime.serving.http_server",
    "edge_runtime.serving.predict",
    "edge_runtime.serving.session",
    "edge_runtime.serving.source",
    "edge_runtime.log",
    "edge_runtime.protocol.messages",
    "edge_runtime.package.manifest",
    "edge_runtime.profile.plan_text",
    "edge_runtime.profile.run",
    "edge_runtime.profile.comparisons",
    "edge_runtime.profile.facts",
    "edge_runtime.profile.identity",
    "edge_runtime.profile.page",
    "edge_runtime.data.rows",
    "edge_runtime.protocol.signing",
    "edge_runtime.agent.store",
    "edge_runtime.agent.transport",
    "edge_runtime.profile.what_if",
]
#: Imports modules by name in a fresh process in which some packages cannot be imported at all.
PROGRAM = """
import importlib, sys

class Fence:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            raise ImportError(f"{name} must not be imported here")

FORBIDDEN = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Fence())
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def import_behind_a_fence(forbidden: str, modules: list[str]) -> None:
    command = [sys.executable, "-c", PROGRAM, forbidden, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_ground_floor_stands_alone() -> None:
    """No module of edge_runtime imports torch, transformers, the exporter or the coordinator."""
    import_behind_a_fence("torch,transformers,export,coordinator", MODULES)


def test_the_agent_loads_no_engine() -> None:
    """No module of the agent imports numpy, the engine, tokenizers or safetensors."""
    import_behind_a_fence("numpy,onnxruntime,tokenizers,safetensors,psutil,torch", AGENT_MODULES)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["run"],
        ["enrol"],
        ["check"],
        ["doctor"],
        ["support-bundle"],
        ["status"],
        ["plan"],
        ["profile"],
        ["predict"],
        ["serve"],
    ],
)
def test_the_command_line_explains_itself_without_libraries(command: list[str]) -> None:
    """Help needs nothing but the standard library."""
    program = (
        "import sys; from edge_runtime.cli import main\n"
        "try:\n    main([*sys.argv[1:], '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'msgspec', 'urllib3', 'cryptography', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
