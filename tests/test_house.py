"""The house: where files lie, what they may import, how dense and how long they may be.

Size is counted in Python tokens, because a budget in lines alone is met by widening the type."""

import ast
import io
import re
import tokenize
import tomllib
from functools import cache
from pathlib import Path

import pytest

from scale import checkpoints

ROOT = Path(__file__).parents[1]
LESSON = ("attention", "flow", "motus", "latent_action", "data", "train", "sample")
ROOMS = ("backbones", "formats", "kernels", "scale", "scripts", "weights", "worlds")
# From the ground up: a file imports its own rank or a lower one, never a higher one.
RANKS = (
    ("weights", "kernels", "worlds"),
    ("formats",),
    ("attention", "flow"),
    ("backbones",),
    ("motus", "latent_action"),
    ("data",),
    ("scale",),
    ("train", "sample"),
    ("scripts",),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
# Files that never import each other although they stand on one floor, and the one lazy step down.
NEIGHBOURS = {("worlds", "weights"): False, ("kernels", "weights"): False}
NOISE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@cache
def sources() -> list[Path]:
    """Every Python file but tests, relative to the root."""
    found = [ROOT / f"{name}.py" for name in LESSON]
    found += [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [path.relative_to(ROOT) for path in found]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


@cache
def size(path: Path) -> tuple[int, int, list[str]]:
    """Tokens of code, lines that hold code, and those lines."""
    text = (ROOT / path).read_text()
    docs = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                docs.update(range(node.lineno, node.end_lineno + 1))
    tokens, code = 0, set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in NOISE or token.type == tokenize.STRING and token.start[0] in docs:
            continue
        tokens += 1
        code.update(range(token.start[0], token.end[0] + 1))
    lines = text.splitlines()
    return tokens, len(code), [lines[i - 1] for i in sorted(code)]


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def functions(path: Path) -> list[ast.FunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]


# -- where things lie -----------------------------------------------------------------------------


def test_the_root_holds_the_seven_files_of_the_lesson_and_no_other():
    assert {path.stem for path in ROOT.glob("*.py")} == set(LESSON)


def test_what_is_installed_is_what_is_there():
    """pyproject names every module and room, as packages and to the sorter of imports."""
    stored = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert set(stored["setuptools"]["py-modules"]) == set(LESSON)
    assert set(stored["setuptools"]["packages"]) == set(ROOMS)
    first_party = stored["ruff"]["lint"]["isort"]["known-first-party"]
    assert set(first_party) == {*LESSON, *ROOMS}
    folders = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/__init__.py")}
    assert folders == set(ROOMS)


def test_every_file_begins_with_what_it_is():
    for path in sources():
        doc = ast.get_docstring(tree(path))
        assert doc and len(doc) > 20, f"{path} needs a docstring"


# -- imports --------------------------------------------------------------------------------------


def imported(path: Path) -> list[str]:
    """Modules of ours that a file imports, lazily or by name too."""
    names = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).rsplit(".", 1)[-1]
            if called in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant):
                names.append(node.args[0].value)
    return [name for name in names if name.split(".")[0] in RANK]


def test_imports_only_point_downwards():
    """attention.py reaches its kernels lazily; nothing else leaves its floor upwards."""
    for path in sources():
        here = room_of(path)
        for name in imported(path):
            there = name.split(".")[0]
            assert RANK[there] <= RANK[here], f"{path} imports {name}, which stands above it"
            assert there == here or here not in ("weights", "kernels", "worlds"), (path, name)


def test_no_two_files_import_each_other():
    """The graph of imports has no circle."""
    modules = {}
    for path in sources():
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        modules[name] = path
    edges = {}
    for name, path in modules.items():
        found = {one for one in imported(path)}
        targets = {one if one in modules else one.rpartition(".")[0] for one in found}
        edges[name] = {target for target in targets if target in modules and target != name}
    # The package of the kernels only hands on the names of its files.
    seen, done = [], set()

    def visit(name: str) -> None:
        assert name not in seen, f"circle: {' -> '.join([*seen, name])}"
        if name in done:
            return
        seen.append(name)
        for target in sorted(edges[name]):
            visit(target)
        seen.pop()
        done.add(name)

    for name in modules:
        visit(name)


def test_nobody_asks_whether_it_is_the_toy():
    """The word stands in its row, its world, its reader and in commands, nowhere else."""
    free = {"worlds", "scripts"}
    for path in sources():
        if room_of(path) in free or path.name in ("motus.py", "rendered.py"):
            continue
        strings = [
            node.value
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        names = [node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)]
        docs = {ast.get_docstring(n, clean=False) for n in [tree(path), *functions(path)]}
        docs |= {
            ast.get_docstring(n, clean=False)
            for n in ast.walk(tree(path))
            if isinstance(n, ast.ClassDef)
        }
        said = [text for text in strings if text not in docs and re.search(r"\btoy\b", text)]
        defaults = {"toy"}  # the default of --preset and of a card
        assert not [text for text in said if text not in defaults], (path, said)
        assert not [name for name in names if "toy" in name.lower()], path


# -- size and density -----------------------------------------------------------------------------


def test_the_lesson_fits_an_evening():
    lessons = [Path(f"{name}.py") for name in LESSON]
    lines = {path.stem: len((ROOT / path).read_text().splitlines()) for path in lessons}
    assert sum(size(path)[0] for path in lessons) <= 22_500
    assert sum(lines.values()) <= 3_000
    assert lines.pop("motus") <= 620 and lines.pop("train") <= 560
    assert max(lines.values()) <= 450


def test_all_code_does_not_grow():
    """The aim is 120,000; whoever deletes lowers the bound."""
    assert sum(size(path)[0] for path in sources()) <= 139_590


@pytest.mark.parametrize("room", [*LESSON, *ROOMS])
def test_a_line_holds_one_thought(room):
    """Tokens per code line, assignments of tuples to tuples, and named lambdas."""
    paths = [path for path in sources() if room_of(path) == room]
    bound = {"kernels": 14}.get(room, 11 if room in (*LESSON, "backbones") else 12.5)
    for path in paths:
        tokens, lines, _ = size(path)
        assert tokens <= bound * max(lines, 1), f"{path}: {tokens / lines:.1f} tokens a line"
        pairs = lambdas = 0
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Assign):
                continue
            lambdas += isinstance(node.value, ast.Lambda)
            pairs += isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        named = lambdas and path != Path("kernels/attention.py")
        assert not named, f"{path}: a named lambda"
        assert pairs <= max(1, lines / 100), f"{path}: {pairs} assignments of tuples to tuples"


def test_no_line_of_code_is_wider_than_a_hundred_columns():
    wide = [(path, line) for path in sources() for line in size(path)[2] if len(line) > 100]
    assert not wide


def test_functions_are_short_and_take_few_parameters():
    for path in sources():
        for function in functions(path):
            if room_of(path) == "kernels":
                continue
            length = function.end_lineno - function.lineno + 1
            arguments = function.args
            count = len(arguments.args) + len(arguments.kwonlyargs) + len(arguments.posonlyargs)
            assert length <= 60, f"{path}: {function.name} has {length} lines"
            assert count <= 8, f"{path}: {function.name} has {count} parameters"


def test_the_layer_takes_six_parameters_at_most():
    layer = next(n for n in tree(Path("motus.py")).body if getattr(n, "name", "") == "Layer")
    forward = next(n for n in layer.body if getattr(n, "name", "") == "forward")
    assert len(forward.args.args) + len(forward.args.kwonlyargs) <= 6


def test_no_expression_stands_for_a_statement():
    """A line that is a value does nothing but call something, once."""
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Expr):
                allowed = (ast.Call, ast.Constant, ast.Yield, ast.YieldFrom, ast.Await)
                assert isinstance(node.value, allowed), f"{path}:{node.lineno}"
                walrus = [n for n in ast.walk(node) if isinstance(n, ast.NamedExpr)]
                assert not walrus, f"{path}:{node.lineno} assigns inside a call"


def test_no_comprehension_goes_over_two_levels():
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, kinds):
                assert len(node.generators) <= 2, f"{path}:{node.lineno}"


# -- words ----------------------------------------------------------------------------------------


def test_docstrings_say_what_a_thing_is():
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                doc = ast.get_docstring(node) or ""
                assert not doc.startswith("What "), f"{path}: {node.name}"


def test_errors_say_what_is_expected():
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"\b(is|are) due\b", node.value), f"{path}:{node.lineno}"


def test_the_readme_is_no_longer_than_the_best_ones():
    assert len((ROOT / "README.md").read_text().split()) <= 2_200


def test_the_digest_of_the_code_reads_our_files_alone(monkeypatch):
    """Every file of ours, and nothing of an environment that lies in the folder: it has fourteen
    thousand, and every run waited for them."""
    read = []
    text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: read.append(path) or text(path))
    once = checkpoints.code_digest.__wrapped__()
    ours = [path for room in ("", *ROOMS) for path in (ROOT / room).glob("*.py")]
    assert sorted(read) == sorted(ours)
    monkeypatch.setattr(Path, "read_text", lambda path: text(path) + "#" * (path.name == "muon.py"))
    assert checkpoints.code_digest.__wrapped__() != once
