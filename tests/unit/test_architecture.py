"""The tree's own rules, read off its syntax."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("lib", "data", "refer", "bert", "benchmarks", "tools")
FILES = sorted(
    [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")] + list(ROOT.glob("*.py"))
)
SCRIPTS = {"train", "test", "demo_inference", "utils", "args"}
# What a package may import of the project; the scripts, benchmarks and tools may all.
LAYERS = {
    "lib": {"lib", "bert", "data"},  # data: only the normalisation that the engine does
    "bert": {"bert", "lib"},  # lib: only its exception, and the look at checkpoints
    "data": {"data", "refer", "bert", "lib", "utils"},
    "refer": {"refer", "lib", "data"},  # data: only pictures and what is kept on disk
}
ENTRY_POINTS = {"refer/check.py"}  # scripts inside a package, which no other module imports
PROJECT = {*FOLDERS, *SCRIPTS, "tests"}
IMPORTED_FROM = {
    ("lib", "data"): {"data.transforms"},
    ("bert", "lib"): {"lib.errors", "lib.checkpoint.vetting"},
    ("refer", "data"): {"data.cache", "refer.images"},
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of the imported modules; of ``from a import b`` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """'torch.load' of such an expression, '' of others."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr}"
    return ""


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def run_on_import(tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes outside functions, lambdas and ``if __name__ == "__main__"``."""
    waiting: list[ast.AST] = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))
    ]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def test_the_tree_is_found() -> None:
    names = {name_of(p) for p in FILES}
    assert {"lib/lavt.py", "data/transforms.py", "train.py", "utils.py"} <= names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_command_lines_stay_out_of_lib(path: Path) -> None:
    if path.parent.name != "lib":
        pytest.skip("not in lib/")
    tree = tree_of(path)
    used = {dotted(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    allowed = {"argparse.Namespace"} if path.name == "checkpoint.py" else set()
    assert {u for u in used if u.startswith("argparse.")} <= allowed
    assert allowed or not [i for i in imports(tree) if i.split(".")[0] in ("argparse", "args")]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            every = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            assert "args" not in [a.arg for a in every], f"{node.name} takes args"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_utils_talks_to_other_processes(path: Path) -> None:
    tree = tree_of(path)
    found = {i for i in imports(tree) if i.startswith("torch.distributed")}
    found |= {
        d
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and (d := dotted(n)).startswith("torch.distributed")
    }
    assert not found or name_of(path) == "utils.py"
    wraps = {i for i in imports(tree) if i.endswith("DistributedDataParallel")}
    assert not wraps or name_of(path) == "train.py"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_importing_parses_no_command_line(path: Path) -> None:
    names = [dotted(n.func) for n in run_on_import(tree_of(path)) if isinstance(n, ast.Call)]
    assert not [n for n in names if "parse" in n.rpartition(".")[2] and n != "ast.parse"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_opened_safely(path: Path) -> None:
    for call in calls(tree_of(path)):
        function = dotted(call.func)
        assert function not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), call.lineno
        if function == "torch.load":
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert keywords.get("weights_only") == "True", call.lineno
        if function.endswith("numpy.load") or function == "np.load":
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert keywords.get("allow_pickle", "False") == "False", call.lineno


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_layers(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    used = {i for i in imports(tree_of(path)) if i.split(".")[0] in PROJECT}
    scripts = {entry.removesuffix(".py").replace("/", ".") for entry in ENTRY_POINTS}
    assert package == "benchmarks" or not used & scripts
    if package not in LAYERS or name_of(path) in ENTRY_POINTS:
        pytest.skip("may import anything")
    assert {i.split(".")[0] for i in used} <= LAYERS[package]
    for (importer, imported), modules in IMPORTED_FROM.items():
        if package == importer:
            inside = {i for i in used if i.split(".")[0] == imported}
            assert all(any(i == m or i.startswith(m + ".") for m in modules) for i in inside)
    assert not [i for i in used if i.split(".")[0] == "tests"]
