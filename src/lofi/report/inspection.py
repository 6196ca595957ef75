"""The page of `lofi inspect`: an adapter's updates, or how alike two adapters are, as figures and tables.

Knows  updates (spectrum.py) and similarities (similarity.py). Knows not  folders or models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lofi.errors import RequestError
from lofi.files.atomic import write_text
from lofi.report.drawings import Drawing, Heat, Lines, svg
from lofi.report.similarity import VIEWS, Similarity, mean_view
from lofi.report.spectrum import Update

MOST_GRID = 16
"""Rows and columns of a similarity grid that are drawn; more are thinned out evenly."""
VIEW_WORDS = {
    "A": "right-singular vectors of A (LoRA paper, eq. 4)",
    "input": "right-singular vectors of the update: what it reads",
    "output": "left-singular vectors of the update: what it writes",
}


def check_output(path: str | Path) -> Path:
    """The path of a figure to write; RequestError where it ends in neither .html nor .png."""
    target = Path(path)
    if target.suffix.lower() not in (".html", ".png"):
        raise RequestError(f"--output is {path}, expected a file that ends in .html or .png")
    return target


def write_inspection(
    path: str | Path,
    title: str,
    drawings: Sequence[Drawing],
    *,
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Path:
    """Write the figures as one self-contained page (.html) or as one picture (.png, figures alone).

    Raises  RequestError for another ending, or for a picture of nothing; LofiError when the disk refuses
    """
    target = check_output(path)
    if target.suffix.lower() == ".png":
        from lofi.report.png import write_png

        if not drawings:
            raise RequestError(f"there is nothing to draw of {title}; write a page with its tables: --output page.html")
        return write_png(target, title, drawings)
    import jinja2

    source = Path(__file__).with_name("inspection.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    figures = [(drawing.title, drawing.note, svg(drawing)) for drawing in drawings]
    filled = {name: list(rows) for name, rows in (tables or {}).items() if rows}
    write_text(target, template.render(title=title, facts=facts, notes=list(notes), figures=figures, tables=filled))
    return target


def place_of(path: str) -> tuple[str, str]:
    """("self_attn.q_proj", "3") of model.layers.3.self_attn.q_proj; no layer gives ("embed_tokens", "")."""
    match = re.fullmatch(r".*?\.(\d+)\.(.+)", f".{path}")
    if match is None:
        return ".".join(path.split(".")[-2:]), ""
    head = path[: match.start(1) - 1].split(".")
    side = next((f"{part} " for part in head if part in ("encoder", "decoder")), "")
    return side + match[2], match[1]


def by_layer(values: Mapping[str, float | None], title: str, *, top: float | None = None, note: str = "") -> Heat:
    """A heat map of one number a module: kinds of modules down, layers across."""
    placed = {place_of(path): value for path, value in values.items()}
    kinds = list(dict.fromkeys(kind for kind, _ in placed))
    layers = sorted({layer for _, layer in placed}, key=lambda layer: int(layer or -1))
    rows = [[placed.get((kind, layer)) for layer in layers] for kind in kinds]
    most = max((value for value in values.values() if value is not None), default=1.0)
    words = [kind.removeprefix("self_attn.").removeprefix("mlp.") for kind in kinds]
    names = words if len(set(words)) == len(words) else kinds
    return Heat(title, [name[-14:] for name in names], layers, rows, most if top is None else top, note, "layer")


def drawings_of(updates: Sequence[Update]) -> list[Drawing]:
    """What can be drawn of one adapter: norms, effective ranks, amplification and spectra."""
    if not updates:
        return []
    found: list[Drawing] = []
    if all(update.beside is not None for update in updates):
        note = "||s B A|| / ||W||: how far each weight is moved, beside its own size"
        found.append(
            by_layer({u.path: u.relative for u in updates}, "Norm of the update relative to the weight", note=note)
        )
        note = (
            "||s B A|| / ||U^T W V^T||: how much more of its directions the update adds than the weight has (table 7)"
        )
        factors = {u.path: u.beside.factor for u in updates if u.beside is not None}
        finite = {path: value if value < 1e9 else None for path, value in factors.items()}
        found.append(by_layer(finite, "Amplification factor", note=note))
    else:
        found.append(by_layer({u.path: u.norm for u in updates}, "Norm of the update", note="Frobenius norm of s B A"))
    share = {u.path: u.effective_rank / u.rank for u in updates}
    note = "exp of the entropy of the singular values, over R: 1 uses every direction alike"
    found.append(by_layer(share, "Effective rank as a share of the rank", top=1.0, note=note))
    lines = {u.path: [v / u.values[0] for v in u.values if v > 0] for u in updates if u.values and u.values[0] > 0}
    if lines:
        found.append(Lines("Singular values over the largest", lines, "one line a module", "direction"))
    return found


def drawings_against(found: Sequence[Similarity], names: tuple[str, str]) -> list[Drawing]:
    """Grids of phi(i, j), mean over the modules, and phi of the smaller rank by layer; each with its null level."""
    drawn: list[Drawing] = []
    for name in VIEWS:
        view = mean_view(found, name)
        if view is None:
            continue
        rows, columns = _thinned(len(view.grid)), _thinned(len(view.grid[0]))
        values = [[view.grid[i - 1][j - 1] for j in columns] for i in rows]
        chance = f"by chance {view.null(1, 1):.3f} at (1, 1), {view.null(view.k, view.k):.3f} at ({view.k}, {view.k})"
        note = f"{VIEW_WORDS[name]}; mean over {len(found)} modules; {chance}"
        across = f"first j directions of {names[1]}"
        drawn.append(
            Heat(f"phi(i, j): {name}", [f"i = {i}" for i in rows], list(map(str, columns)), values, 1.0, note, across)
        )
        full = {one.path: one.views[name].full for one in found if name in one.views}
        nulls = [one.views[name].null(view.k, view.k) for one in found if name in one.views]
        note = f"all directions of both; by chance {min(nulls):.3f} to {max(nulls):.3f}"
        drawn.append(by_layer(full, f"phi({view.k}, {view.k}) by layer: {name}", top=1.0, note=note))
    return drawn


def _thinned(count: int) -> list[int]:
    """1 to count, at most MOST_GRID of them, the last one included."""
    if count <= MOST_GRID:
        return list(range(1, count + 1))
    return sorted({round(1 + (count - 1) * n / (MOST_GRID - 1)) for n in range(MOST_GRID)})


def table_of(updates: Sequence[Update]) -> list[dict[str, str]]:
    """A row for each module."""
    return [
        {
            "module": update.path,
            "shape": f"{update.shape[0]} x {update.shape[1]}",
            "rank": str(update.rank),
            "multiplier": f"{update.scale:g}",
            "norm": f"{update.norm:.4g}",
            "of the weight's": "" if update.relative is None else f"{update.relative:.2%}",
            "amplification": "" if update.beside is None else f"{update.beside.factor:.3g}",
            "effective rank": f"{update.effective_rank:.2f}",
            "stable rank": f"{update.stable_rank:.2f}",
            "dead": str(update.dead),
        }
        for update in updates
    ]


def table_against(found: Sequence[Similarity]) -> list[dict[str, str]]:
    """A row for each module: the updates' cosine, and phi of all directions in every view (in brackets: by chance)."""
    rows = []
    for one in found:
        row = {"module": one.path, "shape": f"{one.shape[0]} x {one.shape[1]}", "cosine": f"{one.cosine:.3f}"}
        for name in VIEWS:
            view = one.views.get(name)
            row[name] = "" if view is None else f"{view.full:.3f} ({view.null(view.k, view.k):.3f})"
        rows.append(row)
    return rows
