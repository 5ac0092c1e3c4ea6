"""The rules of the code's structure, checked on its syntax."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("lib", "data", "refer", "bert", "benchmarks", "tools")
SCRIPTS = ("train", "test", "demo_inference")
FILES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"), str(path))
    for path in sorted([p for f in FOLDERS for p in (ROOT / f).rglob("*.py")])
    + sorted(ROOT.glob("*.py"))
}
NETWORK = tuple(
    f"lib.{name}"
    for name in (
        *("swin", "backbone", "fusion", "mask_predictor", "lavt", "crossvlt"),
        *("variants", "model", "losses", "segmentation", "no_target"),
    )
)
# From top to bottom. A module imports from its own layer and from those below.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("train", "test", "demo_inference", "benchmarks"),
    ("tools",),
    ("args",),
    ("lib.training", "lib.predictor", "lib.attention", "lib.visualize", "lib.evaluation"),
    ("data",),
    ("refer",),
    ("lib.fast",),
    ("lib.runtime", "lib.checkpoint"),
    ("lib.evaluation.protocol",),
    (*NETWORK, "lib.cpu"),
    ("bert",),
    ("utils", "lib.weights"),
    ("lib.refused", "lib.numpy_values"),
    ("lib.launch", "lib.terminal", "lib.facts"),
    ("lib.errors",),
)
# A benchmark may be run by another; the figures of attention belong to the predictor's layer.
BUDGET_FILES, BUDGET_LINES = 44, 7980  # of the project's files that `import train` loads


def module_of(name: str) -> str:
    """'lib.swin' of 'lib/swin.py', 'refer' of 'refer/__init__.py'."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def layer_of(module: str) -> int | None:
    """Position of the longest matching prefix, None outside the project."""
    result = [
        (len(prefix), i)
        for i, layer in enumerate(LAYERS)
        for prefix in layer
        if module == prefix or module.startswith(prefix + ".")
    ]
    return max(result)[1] if result else None


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


def attributes(tree: ast.AST) -> set[str]:
    return {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_all_files_have_a_layer() -> None:
    assert {"lib/lavt.py", "data/transforms.py", "train.py", "utils.py"} <= FILES.keys()
    names = {module_of(name) for name in FILES} - {"lib"}
    assert not [name for name in names if layer_of(name) is None]


def test_imports_go_down() -> None:
    wrong = []
    for name, tree in FILES.items():
        own = layer_of(module_of(name))
        for used in imports(tree):
            other = layer_of(used)
            if own is not None and other is not None and other < own:
                wrong.append(f"{name} imports {used}")
    assert not wrong


def test_no_script_is_imported() -> None:
    wrong = [
        f"{name} imports {used}"
        for name, tree in FILES.items()
        for used in imports(tree)
        if used.split(".")[0] in (*SCRIPTS, "tests")
    ]
    assert not wrong


def test_the_network_is_plain() -> None:
    """Only torch, timm, transformers and itself: no files, processes or private names of torch."""
    allowed = {"torch", "timm", "transformers", "__future__", "typing", "collections", "math"}
    allowed |= {"copy", "re", "abc", "dataclasses", "functools", "types", "itertools", "contextlib"}
    allowed |= {"inspect", "os"}  # os: PathLike in segmentation.py, checked below
    own = {*NETWORK, "lib.errors", "bert", "bert.build_text_encoder", "bert.load_config"}
    wrong = []
    for module in NETWORK:
        name = module.replace(".", "/") + ".py"
        tree = FILES[name]
        for used in imports(tree):
            if used in ("lib", "lib.cpu") and module == "lib.segmentation":
                continue  # build_model accelerates the finished model
            project = used.split(".")[0] in ("lib", "bert", "data", "refer", "utils", "args")
            known = any(used == o or used.startswith(o + ".") for o in own)
            if not (known if project else used.split(".")[0] in allowed):
                wrong.append(f"{name} imports {used}")
            if used.split(".")[0] == "os" and used not in ("os", "os.PathLike"):
                wrong.append(f"{name} imports {used}")
        for used in {*attributes(tree), *imports(tree)}:
            parts = used.split(".")
            if parts[0] == "torch" and ("ops" in parts or any(p.startswith("_") for p in parts)):
                wrong.append(f"{name} uses {used}")
    assert not wrong


def test_private_names_of_torch_stay_in_lib_cpu() -> None:
    private = [
        f"{name} uses {used}"
        for name, tree in FILES.items()
        if not name.startswith("lib/cpu/")
        for used in {*attributes(tree), *imports(tree)}
        for root, *parts in [used.split(".")]
        if root in ("torch", "nn", "F", "dist")
        and any(part.startswith("_") and not part.startswith("__") for part in parts)
    ]
    assert not private


def test_the_accelerated_modules_are_imported_in_two_functions_only() -> None:
    users = {
        name
        for name, tree in FILES.items()
        if any(used.startswith("lib.cpu") for used in imports(tree))
        and not name.startswith(("lib/cpu/", "benchmarks/"))
    }
    assert users == {"lib/segmentation.py", "lib/runtime.py"}
    for name in users:
        top = [n for n in FILES[name].body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not [used for node in top for used in imports(node) if "lib.cpu" in used]


def test_command_lines_stay_out_of_lib() -> None:
    allowed = "lib/weights.py"  # the release stores its arguments in a Namespace
    wrong = []
    for name, tree in FILES.items():
        if not name.startswith("lib/"):
            continue
        if [i for i in imports(tree) if i.split(".")[0] == "args"]:
            wrong.append(f"{name} imports args")
        if [u for u in attributes(tree) if u.startswith("argparse.")] and name != allowed:
            wrong.append(f"{name} uses argparse")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                every = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                if "args" in [a.arg for a in every]:
                    wrong.append(f"{name}: {node.name} takes args")
    assert not wrong


def test_only_utils_talks_to_other_processes() -> None:
    wrong = [
        f"{name} uses {used}"
        for name, tree in FILES.items()
        if name != "utils.py"
        for used in {*imports(tree), *attributes(tree)}
        if used.startswith("torch.distributed") or used.endswith("DistributedDataParallel")
    ]
    assert not wrong


def test_files_are_opened_safely() -> None:
    wrong = []
    for name, tree in FILES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            function = dotted(call.func)
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            unsafe = function in ("pickle.load", "pickle.loads", "pickle.Unpickler")
            unsafe |= function == "torch.load" and keywords.get("weights_only") != "True"
            unsafe |= function in ("np.load", "numpy.load") and (
                keywords.get("allow_pickle", "False") != "False"
            )
            if unsafe:
                wrong.append(f"{name}, line {call.lineno}: {function}")
    assert not wrong


def test_importing_parses_no_command_line() -> None:
    wrong = []
    for name, tree in FILES.items():
        for node in tree.body:
            guarded = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            if guarded or isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            names = [dotted(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]
            wrong += [f"{name}: {n}" for n in names if n.endswith(("parse_args", "parse_train"))]
    assert not wrong


def test_what_train_imports_stays_small() -> None:
    code = "import sys, train; print(*(getattr(m, '__file__', None) for m in sys.modules.values()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {Path(p) for p in done.stdout.split() if p != "None"}
    own = [p for p in loaded if p.is_relative_to(ROOT) and ".venv" not in p.parts]
    lines = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in own)
    assert len(own) <= BUDGET_FILES, sorted(map(str, own))
    assert lines <= BUDGET_LINES
