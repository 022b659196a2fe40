"""A page with tables, curves and moving crystals, which opens without a network.

Plotly draws the curves, chemiscope the crystals. Both bring their JavaScript along in their wheels; it is
written into the page, and the page forbids itself to load anything else.
"""

from __future__ import annotations

import html
import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ase.data import chemical_symbols
from ase.data.colors import jmol_colors
from numpy.typing import NDArray

from fastchgnet.errors import InputError
from fastchgnet.files import write_atomically
from fastchgnet.markup import page, paragraphs
from fastchgnet.report import Table
from fastchgnet.sim.page_script import CURVES, FILTER, MOVIES, STYLE

if TYPE_CHECKING:
    from ase import Atoms

NEEDS_LIBRARIES = "pages with pictures need plotly and chemiscope: pip install 'fastchgnet[report]'"

_PLOTLY = ("plotly", "package_data/plotly.min.js")
_CHEMISCOPE = ("chemiscope", "sphinx/static/chemiscope.min.js")

MAX_LINES = 40
"""Lines in a panel: more are a blur, and megabytes."""

MAX_POINTS = 20_000
"""Points in a panel, 20 bytes each."""

MAX_FRAMES = 100
"""Frames of a movie: what a slider resolves."""

MAX_ATOMS = 200_000
"""Atoms in the frames of all movies together, 20 bytes each."""

_COLORS = (
    "#2f6690",
    "#d1603d",
    "#4f9d69",
    "#8e6c8a",
    "#c79b2c",
    "#5aa9c4",
    "#7a5230",
    "#d68fb0",
    "#6b7b8c",
    "#a3b84c",
)


Indices = NDArray[np.int64]


class Line(NamedTuple):
    """Points of which those that are shown are read; values that are not finite are gaps."""

    n_points: int
    read: Callable[[Indices], tuple[Sequence[float], Sequence[float]]]  # x and y of points, ascending

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> Line:
        """Take points that are in memory."""
        return cls(len(x), lambda kept: ([x[index] for index in kept], [y[index] for index in kept]))


class Movie(NamedTuple):
    """Frames of a system of which those that are shown are read."""

    n_frames: int
    n_atoms: int
    read: Callable[[Indices], Iterable[Atoms]]  # frames, ascending

    @classmethod
    def of(cls, frames: Sequence[Atoms]) -> Movie:
        """Take frames that are in memory."""
        n_atoms = len(frames[-1]) if frames else 0
        return cls(len(frames), n_atoms, lambda kept: [frames[index] for index in kept])


class Panel(NamedTuple):
    """Lines over a common abscissa."""

    name: str
    unit: str
    x_name: str
    lines: Mapping[str, Line]


def require_libraries() -> None:
    """Raise InputError where a library that draws is not installed."""
    for library in (_PLOTLY, _CHEMISCOPE):
        _script_of(*library)


def write_page(
    path: Path,
    title: str,
    notes: Sequence[str],
    tables: Sequence[Table],
    panels: Sequence[Panel],
    movies: Mapping[str, Movie],
) -> None:
    """Write a page that holds all it shows: notes and the first table, movies, curves, the other tables.

    Long curves and movies are thinned, and the page says so. What is not shown is not read.

    Args:
        path: the file; it is whole or not there.
        title: of the page.
        notes: sentences below the title.
        tables: the first one above the pictures.
        panels: curves.
        movies: of each system by its name. Energies and magnetic moments that the calculators of
            all frames hold already are shown with them. A frame with NaN in it is left out.

    Raises:
        InputError: plotly or chemiscope is not installed, or the file cannot be written.
    """
    require_libraries()
    scripts = [f"<style>{STYLE}</style>"]
    parts = [paragraphs(notes), *(_table(table) for table in tables[:1])]
    if shown := _shown(movies):
        scripts.append(f"<script>{_script_of(*_CHEMISCOPE)}</script>")
        parts.append(_movie_section(shown, len(movies)))
    panels = [panel for panel in panels if panel.lines]
    if panels:
        scripts.append(f"<script>{_script_of(*_PLOTLY)}</script>")
        parts.append(_curve_section(panels))
    parts += [_table(table) for table in tables[1:]]
    parts.append(paragraphs(["Curves by plotly.js (MIT), crystals by chemiscope (BSD-3-Clause)."]))
    write_atomically(path, page(title, "\n".join(parts), FILTER + "\n".join(scripts) + "\n"))


def _script_of(package: str, name: str) -> str:
    """Read a library's JavaScript; importing the package itself would bring in Jupyter."""
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / name
        if path.is_file():
            return path.read_text(encoding="utf-8").replace("</script", r"<\/script")
    raise InputError(NEEDS_LIBRARIES)


def _table(table: Table) -> str:
    return f'<div class="table">{table.html()}</div>'


def _data(name: str, value: Any) -> str:
    """Put data into the page; no text in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _curve_section(panels: Sequence[Panel]) -> str:
    names = dict.fromkeys(name for panel in panels for name in panel.lines)
    color = {name: _COLORS[position % len(_COLORS)] for position, name in enumerate(names)}
    figures, notes = [], []
    for panel in panels:
        figure, note = _figure(panel, color)
        figures.append(figure)
        notes += [note] if note else []
    return "\n".join(
        [
            "<h2>Curves</h2>",
            f'<p class="legend" id="panel-legend">{_legend(color)}</p>',
            '<div class="panels" id="panels"></div>',
            paragraphs(notes),
            _data("panel-data", figures),
            f"<script>{CURVES}</script>",
        ]
    )


def _legend(color: Mapping[str, str]) -> str:
    """Name the lines of all panels, to be shown and hidden, unless there are more than colours."""
    if not 1 < len(color) <= len(_COLORS):
        return ""
    return " ".join(
        f'<span data-color="{shade}"><i style="background: {shade}"></i>{html.escape(name)}</span>'
        for name, shade in color.items()
    )


def _figure(panel: Panel, color: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Describe a panel as plotly takes it, and say what is left out."""
    shown = dict(list(panel.lines.items())[:MAX_LINES])
    n_points = MAX_POINTS // len(shown)
    traces, longest = [], 0
    for name, line in shown.items():
        kept = _spread(line.n_points, n_points)
        longest = max(longest, line.n_points)
        x, y = line.read(kept)
        traces.append(
            {
                "name": html.escape(name, quote=False),
                "x": _rounded(np.asarray(x, dtype=float)),
                "y": _rounded(np.asarray(y, dtype=float)),
                "line": {"color": color[name], "width": 1.5},
                "mode": "lines" if len(kept) > 1 else "markers",
            }
        )
    layout = {
        "title": {"text": html.escape(panel.name, quote=False)},
        "xaxis": {"title": {"text": html.escape(panel.x_name, quote=False)}},
        "yaxis": {"title": {"text": html.escape(panel.unit, quote=False)}},
        "hovermode": "x unified" if len(shown) <= len(_COLORS) else "closest",
    }
    missing = []
    if len(shown) < len(panel.lines):
        missing.append(f"{len(shown)} of {len(panel.lines):,} lines")
    if longest > n_points:
        missing.append(f"{n_points:,} of {longest:,} points of a line")
    note = f"{panel.name}: {' and '.join(missing)} are shown." if missing else ""
    return {"data": traces, "layout": layout}, note


def _shown(movies: Mapping[str, Movie]) -> list[dict[str, Any]]:
    """Read and describe the frames to show."""
    shown = []
    for name, kept in _kept_frames(movies).items():
        frames = {
            int(index): frame
            for index, frame in zip(kept, movies[name].read(kept), strict=False)  # a file may have lost some
            if _is_finite(frame)
        }
        if frames:
            shown.append(_movie(name, movies[name].n_frames, frames))
    return shown


def _movie_section(shown: Sequence[dict[str, Any]], n_movies: int) -> str:
    notes = []
    if len(shown) < n_movies:
        notes.append(f"{len(shown)} of {n_movies:,} systems are shown.")
    return "\n".join(
        [
            "<h2>Structures</h2>",
            '<p><select id="movie-name" aria-label="system"></select><span id="movie-caption"></span>'
            '<label id="movie-moments"><input type="checkbox" id="movie-by-moment"> '
            "colours by magnetic moment</label></p>",
            '<div id="movie-view"><div id="movie-meta"></div><div id="movie-structure"></div></div>',
            '<div id="movie-info"></div>',
            '<p class="legend" id="movie-legend"></p>',
            paragraphs(notes),
            _data("movie-data", shown),
            f"<script>{MOVIES}</script>",
        ]
    )


def _kept_frames(movies: Mapping[str, Movie]) -> dict[str, Indices]:
    """Choose the frames to show: evenly, the last one always, within the bounds of a page.

    Where movies are too large together, all are thinned alike; where their last frames alone are, the later
    systems are left out, but never the first.
    """
    movies = {name: movie for name, movie in movies.items() if movie.n_frames}
    n_frames = {name: min(movie.n_frames, MAX_FRAMES) for name, movie in movies.items()}
    total = sum(n_frames[name] * movie.n_atoms for name, movie in movies.items())
    share = min(1.0, MAX_ATOMS / max(total, 1))
    kept: dict[str, Indices] = {}
    n_atoms = 0
    for name, movie in movies.items():
        chosen = _spread(movie.n_frames, max(1, math.floor(share * n_frames[name])))
        n_atoms += len(chosen) * movie.n_atoms
        if kept and n_atoms > MAX_ATOMS:
            break
        kept[name] = chosen
    return kept


def _movie(name: str, n_frames: int, frames: Mapping[int, Atoms]) -> dict[str, Any]:
    """Describe frames as chemiscope takes them; atoms' names are left out where they do not change."""
    atoms = list(frames.values())
    results = [_results(frame) for frame in atoms]
    elements = sorted({int(number) for frame in atoms for number in set(frame.numbers)})
    properties: dict[str, Any] = {"frame": {"target": "structure", "values": list(frames)}}
    if all(np.isfinite(result.get("energy", math.nan)) for result in results):
        energy = [float(result["energy"]) for result in results]
        properties["energy"] = {"target": "structure", "values": _rounded(np.array(energy)), "units": "eV"}
    if all("magmoms" in result for result in results):
        magmoms = np.concatenate([np.asarray(result["magmoms"], dtype=float) for result in results])
        if np.isfinite(magmoms).all():
            values = magmoms.round(2).tolist()
            properties["magmom"] = {"target": "atom", "values": values, "units": "μ_B"}
    n_atoms = len(atoms[-1])
    counted = "" if len(frames) == n_frames else f"; {len(frames)} of {n_frames:,} frames"
    return {
        "name": name,
        "caption": f"{atoms[-1].get_chemical_formula()}, {n_atoms:,} atom{'s' * (n_atoms != 1)}{counted}",
        "elements": [[chemical_symbols[number], _css(jmol_colors[number])] for number in elements],
        "periodic": bool(atoms[0].pbc.any()),
        "structures": list(_structures(atoms)),
        "properties": properties,
    }


def _is_finite(frame: Atoms) -> bool:
    return bool(np.isfinite(frame.positions).all() and np.isfinite(frame.cell.array).all())


def _results(frame: Atoms) -> Mapping[str, Any]:
    """Return what a frame's calculator holds of this very frame."""
    return {} if frame.calc is None or frame.calc.check_state(frame) else frame.calc.results


def _structures(frames: Sequence[Atoms]) -> Iterator[dict[str, Any]]:
    """Yield geometries, moved such that the first frame is within its cell and no atom ever jumps."""
    names: list[str] = []
    first = frames[0]
    # an atom on a face stays on it, whatever its last digits
    images = (
        np.floor(first.get_scaled_positions(wrap=False) + 1e-3) * first.pbc if first.cell.rank == 3 else None
    )
    for frame in frames:
        position = frame.positions
        if images is not None and images.shape == position.shape:
            position = position - images @ frame.cell.array
        x, y, z = position.round(3).T.tolist()
        structure = {"x": x, "y": y, "z": z}
        if names != (names := frame.get_chemical_symbols()):
            structure["names"] = names
        if frame.cell.rank == 3:
            structure["cell"] = frame.cell.array.round(4).ravel().tolist()
        yield structure


def _spread(n: int, n_kept: int) -> Indices:
    """Return at most `n_kept` of n indices, evenly, with the first and the last, or the last alone."""
    if n_kept == 1:
        return np.arange(max(n - 1, 0), n)
    return np.unique(np.linspace(0, n - 1, min(n, n_kept)).round().astype(np.int64))


def _rounded(values: NDArray[np.floating]) -> list[float | None]:
    """Keep nine digits, enough for meV in a total energy, and None where JSON has no number."""
    return [float(f"{value:.9g}") if math.isfinite(value) else None for value in values.tolist()]


def _css(color: NDArray[np.floating]) -> str:
    red, green, blue = (255 * color).round().astype(int)
    return f"rgb({red},{green},{blue})"
