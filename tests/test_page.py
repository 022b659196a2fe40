"""Pages with curves and moving crystals: what they hold, and what a browser makes of them."""

import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from fastchgnet.errors import InputError
from fastchgnet.report import Table
from fastchgnet.sim import page
from fastchgnet.sim.page import Line, Movie, Panel, write_page

EVIL = "<script>alert('x')</script>"


def movie(atoms, n_frames):
    """Frames in which all atoms move to the right, with energies and magnetic moments."""
    frames = []
    for index in range(n_frames):
        frame = atoms.copy()
        frame.positions[:, 0] += 0.1 * index
        magmoms = np.full(len(atoms), 0.5 * index)
        frame.calc = SinglePointCalculator(frame, energy=-10.0 - index, magmoms=magmoms)
        frames.append(frame)
    return frames


def written(tmp_path, tables=(), panels=(), movies=(), title="title", notes=()):
    path = tmp_path / "page.html"
    movies = {name: Movie.of(frames) for name, frames in dict(movies).items()}
    write_page(path, title, notes, tables, panels, movies)
    return path.read_text()


def data(text, name):
    (found,) = re.findall(f'<script type="application/json" id="{name}">(.*?)</script>', text)
    return json.loads(found)


def own_markup(text):
    """The page without the libraries' scripts."""
    return re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)


def test_holds_curves(tmp_path):
    panel = Panel("Energy", "eV", "time (ps)", {"300 K": Line.of([0, 1, 2], [-1234.567891, np.nan, 1.0])})
    (figure,) = data(written(tmp_path, panels=[panel]), "panel-data")
    (trace,) = figure["data"]
    assert trace["x"] == [0, 1, 2]
    assert trace["y"] == [-1234.56789, None, 1.0]
    assert figure["layout"]["xaxis"]["title"]["text"] == "time (ps)"


def test_a_line_has_one_colour_in_all_panels(tmp_path):
    line = Line.of([0, 1], [0, 1])
    panels = [Panel("a", "", "x", {"one": line, "two": line}), Panel("b", "", "x", {"two": line})]
    first, second = data(written(tmp_path, panels=panels), "panel-data")
    assert first["data"][1]["line"] == second["data"][0]["line"] != first["data"][0]["line"]


def test_holds_movies(tmp_path):
    frames = movie(bulk("NaCl", "rocksalt", a=5.64), 3)
    text = written(tmp_path, movies={"salt": frames})
    (held,) = data(text, "movie-data")
    assert held["caption"] == "ClNa, 2 atoms"
    assert [symbol for symbol, _ in held["elements"]] == ["Na", "Cl"]
    assert [structure.get("names") for structure in held["structures"]] == [["Na", "Cl"], None, None]
    assert held["structures"][2]["x"] == [0.2, 3.02]
    assert held["structures"][0]["cell"] == frames[0].cell.array.ravel().tolist()
    assert held["properties"]["energy"]["values"] == [-10, -11, -12]
    assert held["properties"]["magmom"]["values"] == [0, 0, 0.5, 0.5, 1, 1]


def test_atoms_start_in_the_cell_and_never_jump(tmp_path):
    frames = movie(Atoms("Fe2", positions=[(3.95, 0, -1e-9), (-4.0, 2, 9)], cell=[4.0] * 3, pbc=True), 3)
    (held,) = data(written(tmp_path, movies={"iron": frames}), "movie-data")
    assert [structure["x"] for structure in held["structures"]] == [[3.95, 0], [4.05, 0.1], [4.15, 0.2]]
    assert held["structures"][0]["z"] == [0, 1]


def test_molecules_have_no_cell(tmp_path):
    (held,) = data(written(tmp_path, movies={"water": [molecule("H2O")]}), "movie-data")
    assert not held["periodic"]
    assert "cell" not in held["structures"][0]
    assert set(held["properties"]) == {"frame"}


def test_frames_that_have_exploded_are_left_out(tmp_path):
    frames = movie(bulk("Fe"), 3)
    frames[2].positions[0, 1] = np.nan
    text = written(tmp_path, movies={"iron": frames, "lost": frames[2:]})
    (held,) = data(text, "movie-data")
    assert len(held["structures"]) == 2


def test_results_of_another_frame_are_not_shown(tmp_path):
    frames = movie(bulk("Fe"), 2)
    frames[0].calc = frames[1].calc
    (held,) = data(written(tmp_path, movies={"iron": frames}), "movie-data")
    assert set(held["properties"]) == {"frame"}


def test_text_stays_text(tmp_path):
    line = Line.of([0, 1], [0, 1])
    text = written(
        tmp_path,
        tables=[Table(EVIL, (EVIL,), [(EVIL,)])],
        panels=[Panel(EVIL, EVIL, EVIL, {EVIL: line})],
        movies={EVIL: [bulk("Fe")]},
        title=EVIL,
        notes=[EVIL],
    )
    assert EVIL not in text
    (held,) = data(text, "movie-data")
    assert held["name"] == EVIL  # the script makes it text
    (figure,) = data(text, "panel-data")
    assert figure["data"][0]["name"] == "&lt;script&gt;alert('x')&lt;/script&gt;"  # plotly reads HTML


def test_asks_no_network(tmp_path):
    panel = Panel("Energy", "eV", "step", {"one": Line.of([0, 1], [0, 1])})
    text = written(tmp_path, panels=[panel], movies={"iron": [bulk("Fe")]})
    assert not re.findall(r"<(?:link|iframe|img|script)[^>]*(?:src|href)", own_markup(text))
    assert "://" not in own_markup(text)
    assert "default-src 'unsafe-inline'" in text


def test_thins_long_curves_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_POINTS", 40)
    monkeypatch.setattr(page, "MAX_LINES", 2)
    x = range(1001)
    text = written(tmp_path, panels=[Panel("Energy", "eV", "step", {name: Line.of(x, x) for name in "abc"})])
    (figure,) = data(text, "panel-data")
    assert [trace["name"] for trace in figure["data"]] == ["a", "b"]
    for trace in figure["data"]:
        assert len(trace["x"]) == 20
        assert (trace["x"][0], trace["x"][-1]) == (0, 1000)
    assert "Energy: 2 of 3 lines and 20 of 1,001 points of a line are shown." in text


def test_thins_long_movies_and_says_so(tmp_path):
    (held,) = data(written(tmp_path, movies={"iron": movie(bulk("Fe"), 250)}), "movie-data")
    frames = held["properties"]["frame"]["values"]
    assert (len(frames), frames[0], frames[-1]) == (page.MAX_FRAMES, 0, 249)
    assert held["caption"] == "Fe, 1 atom; 100 of 250 frames"


def test_pages_of_many_movies_stay_small(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_ATOMS", 10)
    movies = {f"iron {index}": movie(bulk("Fe"), 4) for index in range(20)}
    text = written(tmp_path, movies=movies)
    held = data(text, "movie-data")
    assert [one["name"] for one in held] == list(movies)[:10]
    assert {tuple(one["properties"]["frame"]["values"]) for one in held} == {(3,)}
    assert "10 of 20 systems are shown." in text


def test_what_is_not_shown_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_ATOMS", 40)
    monkeypatch.setattr(page, "MAX_POINTS", 6)
    monkeypatch.setattr(page, "MAX_LINES", 2)
    read = []

    def frames(kept):
        read.append(kept.tolist())
        return [bulk("Fe") for _ in kept]

    def points(kept):
        read.append(kept.tolist())
        return kept.tolist(), kept.tolist()

    movies = {f"iron {index}": Movie(10**9, 1, frames) for index in range(60)}
    panels = [Panel("Energy", "eV", "step", {name: Line(10**6 + 1, points) for name in "abc"})]
    write_page(tmp_path / "page.html", "title", [], [], panels, movies)
    assert read == [[10**9 - 1]] * 40 + [[0, 500_000, 10**6]] * 2


def test_the_first_movie_is_shown_however_large(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_ATOMS", 1)
    held = data(
        written(tmp_path, movies={"large": [bulk("Fe") * (3, 1, 1)], "more": [bulk("Fe")]}), "movie-data"
    )
    assert [one["name"] for one in held] == ["large"]


def test_tables_alone_need_no_pictures(tmp_path):
    text = written(tmp_path, tables=[Table("One", ("a",), [("1",)])], movies={"none": []})
    assert "<script" not in text


def test_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'fastchgnet\[report\]'"):
        written(tmp_path)
    assert not list(tmp_path.iterdir())


PROBE = """
<script>
window.seen = [];
window.addEventListener('error', (event) => seen.push(event.message));
document.addEventListener('securitypolicyviolation', (event) => seen.push(event.blockedURI));
addEventListener('load', async () => {
  const wait = () => new Promise((resolve) => setTimeout(resolve, 200));
  const drawn = async () => { for (let i = 0; i < 50 && !window.movie; i++) await wait(); await wait(); };
  await drawn();
  const canvases = (place) => place.querySelectorAll('canvas').length + [...place.querySelectorAll('*')]
    .reduce((n, element) => n + (element.shadowRoot ? canvases(element.shadowRoot) : 0), 0);
  const slider = () => document.getElementById('movie-info').firstElementChild.shadowRoot
    .querySelector('input[type=range]');
  const label = () => document.getElementById('movie-info').firstElementChild.shadowRoot
    .querySelector('input[type=number]').value;
  slider().value = 2;
  slider().dispatchEvent(new Event('input', {bubbles: true}));
  slider().dispatchEvent(new Event('change', {bubbles: true}));
  await wait();
  const curves = () => document.querySelectorAll('#panels .scatterlayer .trace').length;
  const view = document.getElementById('movie-structure');
  document.getElementById('movie-by-moment').click();
  await wait();
  const report = {
    frame: label(), last: slider().max, canvases: [canvases(view)],
    curves: curves(),
  };
  document.querySelector('#panel-legend span').click();
  await wait();
  report.left = curves();
  window.movie = undefined;
  const choice = document.getElementById('movie-name');
  choice.selectedIndex = 1;
  choice.dispatchEvent(new Event('change'));
  await drawn();
  report.canvases.push(canvases(view));
  report.caption = document.getElementById('movie-caption').textContent;
  report.legend = document.getElementById('movie-legend').textContent;
  report.loaded = performance.getEntriesByType('resource').map(({name}) => name);
  report.seen = seen;
  document.body.dataset.report = encodeURIComponent(JSON.stringify(report));
});
</script>
"""


def test_runs_in_a_browser(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium or Chrome")
    line = Line.of([0, 1, 2], [0.1, 0.3, 0.2])
    movies = {"salt": movie(bulk("NaCl", "rocksalt", a=5.64), 5), "iron": [bulk("Fe")]}
    text = written(tmp_path, panels=[Panel("Energy", "eV", "step", {"a": line, "b": line})], movies=movies)
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("<body>", "<body>" + PROBE))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += ["--disable-component-update", "--disable-sync", "--use-angle=swiftshader"]
    flags += [
        "--enable-unsafe-swiftshader",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        [browser, *flags, "--virtual-time-budget=20000", "--dump-dom", probed.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = re.search(r'<body data-report="([^"]*)"', done.stdout)
    assert found, done.stderr
    assert json.loads(unquote(found[1])) == {
        "frame": "2",
        "last": "4",
        "canvases": [1, 1],
        "curves": 2,
        "left": 1,
        "caption": "Fe, 1 atom",
        "legend": "Fe",
        "loaded": [],
        "seen": [],
    }
    # chemiscope may draw once more into a view that was just taken away
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "zero size" not in line]
    assert complaints == []
