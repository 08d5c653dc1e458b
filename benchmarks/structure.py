"""Print the structure of the package: levels, cycles, upward imports, largest file.

    python benchmarks/structure.py

A level is the longest chain of imports below a module. Imports within functions and for type checking count too.
Exits with 1 if a module lies flat in `dq/`, imports form a cycle, or a package imports one to its right.
"""

from __future__ import annotations

import argparse
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ORDER = ("core", "config", "data", "networks", "diffusion", "cluster", "refine", "labels", "distilled")
ORDER += ("evaluation", "run", "cli")


def strongly_connected(edges: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import each other, directly or not (Kosaraju's algorithm)."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(start: str, graph: dict[str, set[str]], out: list[str]) -> None:
        stack = [(start, iter(sorted(graph[start])))]
        seen.add(start)
        while stack:
            node, following = stack[-1]
            step = next((n for n in following if n not in seen), None)
            if step is None:
                out.append(node)
                stack.pop()
            else:
                seen.add(step)
                stack.append((step, iter(sorted(graph[step]))))

    for module in sorted(edges):
        if module not in seen:
            visit(module, edges, order)
    reverse: dict[str, set[str]] = {m: set() for m in edges}
    for a, targets in edges.items():
        for b in targets:
            reverse[b].add(a)
    seen.clear()
    groups = []
    for module in reversed(order):
        if module not in seen:
            group: list[str] = []
            visit(module, reverse, group)
            groups.append(set(group))
    return [g for g in groups if len(g) > 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    graph = grimp.build_graph("dq", cache_dir=None)
    modules = {m for m in graph.modules if m != "dq"}
    edges = {m: graph.find_modules_directly_imported_by(m) & modules for m in modules}
    folder = Path(__file__).parents[1] / "dq"
    lines = {p: len(p.read_text().splitlines()) for p in folder.rglob("*.py")}
    largest = max(lines, key=lambda p: lines[p])
    flat = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
    cycles = strongly_connected(edges)
    try:
        levels: dict[str, int] = {}
        for m in TopologicalSorter(edges).static_order():
            levels[m] = 1 + max((levels[n] for n in edges[m]), default=0)
        depth = str(max(levels.values()))
    except CycleError:
        depth = "none, as there are cycles"
    rank = {name: i for i, name in enumerate(ORDER)}
    upward = sorted(
        f"{a} -> {b}"
        for a, targets in edges.items()
        for b in targets
        if rank.get(a.split(".")[1], -1) < rank.get(b.split(".")[1], -1)
    )
    print(f"modules at top level  {len(flat)}")
    print(f"modules               {len(lines)}")
    print(f"imports               {sum(map(len, edges.values()))}")
    print(f"import levels         {depth}")
    print(f"cycles                {len(cycles)}")
    print(f"upward imports        {len(upward)}")
    print(f"largest file          {largest.relative_to(folder.parent)}, {lines[largest]} lines")
    for group in cycles:
        print(f"  cycle: {', '.join(sorted(group))}")
    for edge in upward:
        print(f"  upward: {edge}")
    return 1 if flat or cycles or upward else 0


if __name__ == "__main__":
    sys.exit(main())
