"""Measures the structure of the source: modules, code lines, raises, import circles, and the files of a concern.

python benchmarks/structure.py                         # this checkout
python benchmarks/structure.py OTHER                   # another checkout
python benchmarks/structure.py --area cli --area data  # code lines and raises of some packages only
"""

import argparse
import ast
import io
import re
import tokenize
from pathlib import Path

CONCERNS = {
    "a sampler": r"DPMSolverMultistepScheduler|DPMSolverPlusPlus2MSampler|SamplerName\.dpm|\"dpm\"",
    "a training task": r"AutoregressivePriorTask|AutoregressivePriorSettings|\"prior_autoregressive\"",
    "a sampling setting": r"prior_temperature",
}
"""The names of an existing sampler, task and setting. Adding another one touches the files that contain them."""

SHARED = ("options", "messages", "provenance", "defaults", "usage")
"""Modules that `unclip.cli.main` imports and that define no command."""


def code_lines(text: str) -> int:
    """The lines that hold code: no blank lines, comments or docstrings."""
    tree = ast.parse(text)
    strings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - strings)


def imports(tree: ast.Module, modules: set[str]) -> set[str]:
    """The modules of the project that a module imports at its top level or inside its functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found & modules


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The groups of modules that import each other (strongly connected components of two or more)."""
    reach = {name: set(after) for name, after in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    groups = {frozenset(b for b in graph if b in reach[a] and a in reach[b]) for a in graph if a in reach[a]}
    return [set(group) for group in groups if len(group) > 1]


def main(root: Path) -> None:
    """Print the figures of the checkout `root`."""
    source = root / "src"
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(source.rglob("*.py"))}
    names = {path: ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__") for path in texts}
    trees = {names[path]: ast.parse(text) for path, text in texts.items()}
    graph = {name: imports(tree, set(trees)) - {name} for name, tree in trees.items()}
    lines = sum(map(code_lines, texts.values()))
    raises = sum(isinstance(node, ast.Raise) for tree in trees.values() for node in ast.walk(tree))
    commands = [f"{a} → {b}" for a in graph for b in graph[a] if _is_command(trees, a) and _is_command(trees, b)]
    print(f"modules                      {len(texts)}")
    print(f"code lines                   {lines:,}")
    print(f"code lines a module          {lines / len(texts):.0f}")
    print(f"code lines for each raise    {lines / raises:.0f}")
    print(f"import circles               {len(circles(graph))}")
    print(f"commands importing commands  {len(commands)}  {', '.join(sorted(commands))}")
    for what, pattern in CONCERNS.items():
        files = sorted(
            str(path.relative_to(source / "unclip")) for path, text in texts.items() if re.search(pattern, text)
        )
        print(f"files that contain {what}: {len(files)}  ({', '.join(files)})")


def print_area(root: Path, area: str) -> None:
    """Print the modules, code lines and raises of a file or a folder in `src/unclip`."""
    path = root / "src" / "unclip" / area
    texts = [each.read_text(encoding="utf-8") for each in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    raises = sum(isinstance(node, ast.Raise) for text in texts for node in ast.walk(ast.parse(text)))
    print(f"{area}: {len(texts)} modules, {sum(map(code_lines, texts)):,} code lines, {raises} raises")


def _is_command(trees: dict[str, ast.Module], name: str) -> bool:
    """Whether a module of the command line defines a command: `unclip.cli.main` imports it."""
    return (
        name.startswith("unclip.cli.")
        and name in imports(trees["unclip.cli.main"], set(trees)) | {"unclip.cli.evaluate"}
        and name.rpartition(".")[2] not in SHARED
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path, nargs="?", default=Path("."), help="a checkout (default: this folder)")
    parser.add_argument("--area", action="append", default=[], help="a package or file below src/unclip")
    args = parser.parse_args()
    for area in args.area:
        print_area(args.root, area)
    if not args.area:
        main(args.root)
