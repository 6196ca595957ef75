"""What `lofi inspect ADAPTER --against OTHER` finds: how alike the subspaces of two adapters are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lofi.cli.inspecting import Found, table


def against(folder: Any, other_path: Path, *, whole: bool, output: str | None) -> Found:
    """Two adapters: the similarity of the subspaces that their updates take, beside that of random ones."""
    from lofi.files.adapter_folder import read_folder
    from lofi.report import inspection
    from lofi.report.similarity import VIEWS, mean_view, similarities_of

    other = read_folder(other_path)
    both = similarities_of(folder, other)
    means = {name: view for name in VIEWS if (view := mean_view(both, name)) is not None}
    found = {
        "against": str(other_path),
        "modules": [one.to_dict() for one in both],
        "mean": {name: view.to_dict() for name, view in means.items()},
    }
    lines = [
        (name, f"{v.grid[0][0]:.3f}", f"{v.null(1, 1):.3f}", f"{v.full:.3f}", f"{v.null(v.k, v.k):.3f}")
        for name, v in means.items()
    ]
    k = next(iter(means.values())).k
    heads = ("directions of", "phi(1, 1)", "by chance", f"phi({k}, {k})", "by chance")
    title = f"{folder.path} against {other_path}: mean over {len(both)} modules"
    shown: list[Any] = [table(title, heads, lines)]
    rows = inspection.table_against(both)
    if whole:
        shown.append(table("by module (by chance)", tuple(rows[0]), [tuple(row.values()) for row in rows]))
    if output is not None:
        names = str(folder.path), str(other_path)
        where = inspection.write_inspection(
            output,
            "How alike are two adapters?",
            inspection.drawings_against(both, ("the first", "the second")),
            facts={"the first": names[0], "the second": names[1], "modules in both": str(len(both))},
            notes=[
                "phi(i, j) is 1 where the first i directions of one lie among the first j of the other, 0 where they "
                "are orthogonal; two random subspaces of d dimensions have max(i, j) / d."
            ],
            tables={"phi of all directions (by chance)": rows},
        )
        found["output"] = str(where)
        shown.append(f"written to {where}")
    return found, shown
