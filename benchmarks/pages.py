"""Pages of the documentation that hold the tables of several scripts."""

from __future__ import annotations

from pathlib import Path


def with_tables(page: Path, below: str, tables: str) -> str:
    """The page with these tables below a line of it; what stands above and from the next section on stays."""
    before, found, after = page.read_text(encoding="utf-8").partition(f"\n{below}\n")
    if not found:
        raise SystemExit(f"{page.name}: has no line {below}")
    _, heading, rest = after.partition("\n## ")
    return f"{before}{found}" + (f"\n{tables}\n" if tables else "") + heading + rest
