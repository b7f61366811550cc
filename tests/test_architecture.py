"""Goal: the structure that docs/structure.md promises is the structure of the code.

Method: the four folders' sources are read as syntax trees; one fresh interpreter imports every pure module; installed
distributions are asked who owns our names. Each message names the offender and the rule.
"""

import ast
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "cost_service": set(),
    "replicas": {"cost_service"},
    "global_scheduler": {"cost_service"},
    "cluster": {"cost_service", "replicas", "global_scheduler"},
}
"""Imports between our folders point one way, and nobody but tests imports `cluster`."""

FOLDERS = sorted(MAY_IMPORT)

HEAVY = {"ray", "vllm", "torch", "transformers"}
"""Libraries that only shells may import: seconds to load, and names that move with every release."""

SHELL_PATTERNS = ["vllm_*.py", "serve_*.py", "*_actor.py"]
SHELLS = {
    "cluster/app.py": "builds the Serve application",
    "cluster/ingress.py": "is a Serve deployment",
    "cluster/ray_internals.py": "names Ray's internals for this folder",
    "replicas/ray_internals.py": "names Ray's internals for this folder, apart from vLLM's",
    "cluster/serve.py": "starts Ray and deploys the application",
    "cluster/running.py": "asks the replicas through Ray",
    "cluster/models.py": "converts the default model with torch and transformers",
    "cluster/bench_decision.py": "reads vLLM's requests and blocks to measure it",
    "cluster/calibrate.py": "runs a vLLM engine to measure it",
    "cluster/bench_engine.py": "runs vLLM engines to measure them",
    "cluster/bench_drift.py": "runs a vLLM engine to measure it",
    "cluster/bench_fairness_rpc.py": "runs the fairness actor on Ray to measure it",
}
"""Shells beyond the patterns, each with its reason."""

INTERNALS = ("ray._private", "ray._raylet", "ray.llm._internal", "ray.serve._private")
"""What may move without notice, as may every submodule of vLLM: named in one module per folder and library only."""

INTERNALS_MODULES = {"cluster/ray_internals.py", "replicas/ray_internals.py", "replicas/vllm_internals.py"}

UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {
    "torch.load",
    "numpy.load",
    "np.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.full_load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
}
"""Readers that can run code of whoever wrote the file."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80

SOURCES = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def tree_of(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(), filename=source)


def imports_of(source: str) -> Iterator[str]:
    """Dotted names of everything that a file imports anywhere in it, in functions and by `import_module` too."""
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and dotted(node.func).split(".")[-1] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of such an expression, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def is_shell(source: str) -> bool:
    return source in SHELLS or any(Path(source).match(pattern) for pattern in SHELL_PATTERNS)


def module_of(source: str) -> str:
    return source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_the_four_folders_hold_modules() -> None:
    assert {source.split("/")[0] for source in SOURCES} == set(FOLDERS)


@pytest.mark.parametrize("source", SOURCES)
def test_imports_between_folders_point_one_way(source: str) -> None:
    folder = source.split("/")[0]
    for name in imports_of(source):
        top = name.split(".")[0]
        assert top != "tests", f"{source} imports {name}: tests are nobody's dependency"
        if top in MAY_IMPORT and top != folder:
            assert top in MAY_IMPORT[folder], f"{source} imports {name}: {folder} may import {MAY_IMPORT[folder]}"


@pytest.mark.parametrize("source", SOURCES)
def test_only_shells_import_ray_vllm_and_torch(source: str) -> None:
    heavy = sorted({name for name in imports_of(source) if name.split(".")[0] in HEAVY})
    assert not heavy or is_shell(source), f"{source} imports {heavy} and is no shell"


@pytest.mark.parametrize("source", SOURCES)
def test_internals_of_ray_and_vllm_are_named_in_one_module_of_a_folder(source: str) -> None:
    internal = [name for name in imports_of(source) if name.startswith(INTERNALS)]
    internal += [
        node.module
        for node in ast.walk(tree_of(source))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vllm.")
    ]
    internal += [
        alias.name
        for node in ast.walk(tree_of(source))
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name.startswith("vllm.")
    ]
    assert not internal or source in INTERNALS_MODULES, f"{source} imports {internal}: name it in an internals module"


@pytest.mark.parametrize("source", sorted(INTERNALS_MODULES))
def test_a_module_of_internals_holds_names_and_no_logic(source: str) -> None:
    for node in tree_of(source).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_all = isinstance(node, ast.Assign) and [dotted(target) for target in node.targets] == ["__all__"]
        assert isinstance(node, ast.Import | ast.ImportFrom) or is_docstring or is_all, f"{source}:{node.lineno}"


def test_every_pure_module_loads_in_a_fresh_interpreter_without_ray_vllm_or_torch() -> None:
    pure = [module_of(source) for source in SOURCES if not is_shell(source)]
    script = (
        "import importlib, json, sys\n"
        "guilty = {}\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "    for heavy in sorted(set(json.loads(sys.argv[2])) & set(sys.modules) - set(guilty)):\n"
        "        guilty[heavy] = name\n"
        "print(json.dumps(guilty))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, json.dumps(pure), json.dumps(sorted(HEAVY))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    guilty = json.loads(process.stdout.splitlines()[-1])
    assert not guilty, f"library: module that loads it: {guilty}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folders_name_is_ours_alone(folder: str) -> None:
    spec = importlib.util.find_spec(folder)
    assert spec is not None
    assert spec.origin is not None, f"{folder} has no __init__.py"
    assert Path(spec.origin).resolve() == ROOT / folder / "__init__.py", f"{folder} is imported from {spec.origin}"
    owners = set(importlib.metadata.packages_distributions().get(folder, []))
    assert owners <= {"adaptivellm"}, f"{folder} is also installed by {owners - {'adaptivellm'}}"


@pytest.mark.parametrize("source", SOURCES)
def test_files_and_functions_stay_short_and_files_say_what_they_are(source: str) -> None:
    num_lines = len((ROOT / source).read_text().splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{source} has {num_lines} lines"
    assert ast.get_docstring(tree_of(source)), f"{source} has no docstring"
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            num_lines = node.end_lineno - node.lineno + 1
            assert num_lines <= MAX_FUNCTION_LINES, f"{source}: {node.name} has {num_lines} lines"


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_read_that_could_run_its_writers_code(source: str) -> None:
    unsafe = [name for name in imports_of(source) if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS]
    assert not unsafe, f"{source} imports {unsafe}"
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Call) and dotted(node.func) in UNSAFE_CALLS:
            safe_loader = any(dotted(argument).endswith("SafeLoader") for argument in loaders_of(node))
            assert safe_loader, f"{source}:{node.lineno} calls {dotted(node.func)}"


def loaders_of(call: ast.Call) -> list[ast.expr]:
    return call.args[1:] + [keyword.value for keyword in call.keywords if keyword.arg == "Loader"]


def test_no_file_leaves_something_to_be_done() -> None:
    mark = "TO" + "DO"
    guilty = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if mark in line
    ]
    assert not guilty, guilty


def text_files() -> Iterator[Path]:
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".sh", ".cfg", ".txt", ""}
    for path in sorted(ROOT.iterdir()):
        if path.is_file() and path.suffix in suffixes:
            yield path
        elif path.name in {*FOLDERS, "tests", "docs", "manifests", ".ci"}:
            yield from (
                each
                for each in sorted(path.rglob("*"))
                if each.is_file() and each.suffix in suffixes and "__pycache__" not in each.parts
            )


# The rules themselves: each must find a planted offence.


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import ray", {"ray"}),
        ("def f():\n    from vllm.v1 import request", {"vllm.v1.request"}),
        ("import importlib\nimportlib.import_module('torch')", {"importlib", "torch"}),
        ("if False:\n    import cluster.app as app", {"cluster.app"}),
    ],
)
def test_an_import_is_found_wherever_it_hides(code: str, found: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "tree_of", lambda source: ast.parse(code))
    assert set(imports_of("planted.py")) == found


@pytest.mark.parametrize(
    ("code", "is_offence"),
    [
        ("import pickle", True),
        ("from joblib import load", True),
        ("from torch import load", True),
        ("yaml.load(text)", True),
        ("yaml.load(text, Loader=yaml.Loader)", True),
        ("yaml.load(text, Loader=yaml.SafeLoader)", False),
        ("yaml.load(text, yaml.CSafeLoader)", False),
        ("yaml.safe_load(text)", False),
        ("torch.load(path)", True),
        ("json.load(file)", False),
    ],
)
def test_an_unsafe_reader_is_told_from_a_safe_one(code: str, is_offence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "tree_of", lambda source: ast.parse(code))
    if is_offence:
        with pytest.raises(AssertionError, match=r"planted\.py"):
            test_nothing_is_read_that_could_run_its_writers_code("planted.py")
    else:
        test_nothing_is_read_that_could_run_its_writers_code("planted.py")
