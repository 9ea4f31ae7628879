"""Who may import whom, read from the sources; and who must never pull in torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import chatserve

PACKAGE = Path(chatserve.__file__).parent
SHARED = {
    "errors", "environment", "settings", "options", "config", "progress", "private_database",
    "frames", "helper_process", "running_servers", "meter",
}  # fmt: skip
# package -> the chatserve packages it may import besides itself and the shared ones
ARROWS = {
    "errors": set(),
    "protocol": set(),
    "models": {"kernels"},
    "engine": {"models", "hub"},
    "server": {"engine", "models", "protocol", "flags", "byte_bar", "hub", "grammar"},
    "grammar": {"engine"},
    "cli": {"protocol"},
    "quality": {"engine", "models", "kernels"},
    "doctor": {"server", "engine", "models", "kernels", "hub", "cache"},
    "train": {"models", "engine", "kernels", "hub"},
}
LIGHT = {"cli", "protocol", "flags"} | SHARED
# the composition root starts everything, lazily
ROOT = ("cli/main.py", "cli/commands/", "cli/private_server.py", "cli/__main__.py", "__main__.py")
NO_ENGINE = ("controller", "registry", "relay", "edge", "launch", "supervisor")


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text("utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all chatserve modules imported anywhere, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "chatserve":
            names = [f"chatserve.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        else:
            continue
        yield from (name for name in names if name.startswith("chatserve."))


def wrong_arrows() -> Iterator[str]:
    for file, tree in sources():
        if file.startswith(ROOT):
            continue
        package = file.removesuffix(".py").partition("/")[0]
        allowed = ARROWS.get(package)
        if allowed is None:
            continue
        for name in imports(tree):
            target = name.split(".")[1]
            if target not in allowed | SHARED | {package}:
                yield f"{file} imports {name}"


def test_no_wrong_arrow() -> None:
    assert not list(wrong_arrows())


def test_a_wrong_arrow_is_found() -> None:
    tree = ast.parse("def f():\n    from chatserve.server import relay")
    assert list(imports(tree)) == ["chatserve.server"]


def test_only_its_own_commands_import_training() -> None:
    importers = {
        file
        for file, tree in sources()
        if not file.startswith("train/") and any(n.split(".")[1] == "train" for n in imports(tree))
    }
    own = ("cli/commands/train", "cli/commands/plan_train.py")
    assert not {file for file in importers if not file.startswith(own)}


def test_only_environment_reads_the_environment() -> None:
    readers = [
        file
        for file, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
        and isinstance(node.value, ast.Name) and node.value.id == "os"
    ]  # fmt: skip
    # the compiler is chosen before anything is installed
    assert set(readers) == {"environment.py", "kernels/build.py"}


@pytest.mark.parametrize("word", ["trust_remote_code", "torch.load", "pickle", "dill", "marshal"])
def test_nothing_runs_code_from_model_files(word: str) -> None:
    """Such names may stand in prose, never in code."""
    for file, tree in sources():
        assert word not in set(names(tree)), file


def names(tree: ast.Module) -> Iterator[str]:
    """Everything that code can call, pass or import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            yield ast.unparse(node)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.keyword):
            yield node.arg or ""


def modules_after(code: str) -> set[str]:
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "cli.main", "cli.chat", "cli.client", "cli.render", "cli.commands.chat", "hub",
        "server.controller", "server.registry", "server.relay", "server.edge", "server.launch",
    ],
)  # fmt: skip
def test_controller_and_client_never_import_torch(module: str) -> None:
    loaded = modules_after(f"import chatserve.{module}")
    assert not loaded & {"torch", "transformers", "tokenizers", "numpy"}
    inside = {f"chatserve.{room}" for room in ("engine", "grammar", "models", "kernels")}
    assert not loaded & inside or module == "hub"  # knows names of files that models have


def test_help_and_version_load_next_to_nothing() -> None:
    loaded = modules_after(
        "import contextlib, chatserve.cli.main as m\n"
        "with contextlib.suppress(SystemExit): m.main(['--version'])"
    )
    assert not loaded & {"torch", "httpx", "prompt_toolkit", "rich", "pydantic", "fastapi"}


def test_parsers_of_training_load_none_of_its_libraries() -> None:
    loaded = modules_after("from chatserve.cli.commands.completion import script; script('bash')")
    assert not loaded & {"torch", "trl", "peft", "datasets", "pyarrow", "markdownify", "numpy"}


def test_engine_and_models_import_without_web_packages() -> None:
    """As on a GPU machine that has torch and transformers but nothing of the web side.

    Nor does anything but the kernels themselves need triton to be imported.
    """
    blocked = ["fastapi", "uvicorn", "pydantic", "jinja2", "psutil", "orjson", "aiohttp", "httpx",
               "rich", "prompt_toolkit", "starlette", "sse_starlette", "gguf",
               "triton", "llguidance"]  # fmt: skip
    modules = [
        f"chatserve.{file.removesuffix('.py').replace('/', '.').removesuffix('.__init__')}"
        for file, _ in sources()
        if file.startswith(("engine/", "models/")) and not file.startswith("models/triton/")
    ]
    # transformers itself may use some of them where they are: only our own imports are blocked
    code = "import transformers, torch, sys\n"
    code += f"for name in {blocked}: sys.modules[name] = None\n"
    code += "import " + ", ".join(modules)
    modules_after(code)
