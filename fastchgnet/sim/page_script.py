"""What runs in a page of `page.py`: styles and scripts around the two libraries."""

FILTER = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src data: blob:\">\n"
)
"""The browser itself refuses to load anything from elsewhere."""

STYLE = """
.table { max-height: 32rem; overflow: auto }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }
.panels > div { height: 20rem }
#movie-view { height: 30rem; position: relative }
#movie-structure { height: 100% }
#movie-meta { display: none }
#movie-info { min-height: 4.5rem }
#panel-legend span { cursor: pointer }
#panel-legend i { border-radius: 0; height: .2rem; border: 0; vertical-align: .3rem }
#panel-legend .off { opacity: .35 }
#movie-name { font: inherit; max-width: 60% }
#movie-caption { color: #666; margin: 0 1rem }
.legend span { display: inline-block; margin-right: 1.2rem; white-space: nowrap }
.legend i { display: inline-block; width: .9rem; height: .9rem; border-radius: 50%;
  border: 1px solid #888; margin-right: .4rem; vertical-align: -.1rem }
"""

CURVES = """
(() => {
  const ink = '#333', look = {
    font: {family: 'system-ui, sans-serif', size: 12, color: ink},
    margin: {l: 70, r: 15, t: 40, b: 45},
    hoverlabel: {namelength: -1},
    showlegend: false,
  };
  const axis = {gridcolor: '#e5e5e5', linecolor: ink, ticks: 'outside', zeroline: false, automargin: true};
  const buttons = ['toImage', 'zoom2d', 'pan2d', 'zoomIn2d', 'zoomOut2d', 'resetScale2d'];
  const config = {displaylogo: false, responsive: true, modeBarButtons: [buttons]};
  const place = document.getElementById('panels');
  for (const {data, layout} of JSON.parse(document.getElementById('panel-data').textContent)) {
    const panel = place.appendChild(document.createElement('div'));
    for (const name of ['xaxis', 'yaxis']) Object.assign(layout[name], axis);
    Object.assign(layout.title, {font: {size: 15}, x: 0.02, xanchor: 'left'});
    Plotly.newPlot(panel, data, {...look, ...layout}, config);
  }
  for (const entry of document.querySelectorAll('#panel-legend span')) {
    entry.addEventListener('click', () => {
      const visible = !entry.classList.toggle('off');
      for (const panel of place.children) {
        const line = panel.data.findIndex(({line}) => line.color === entry.dataset.color);
        if (line >= 0) Plotly.restyle(panel, {visible}, line);
      }
    });
  }
})();
"""

MOVIES = """
window.addEventListener('load', () => {
  const get = (id) => document.getElementById(id);
  const movies = JSON.parse(get('movie-data').textContent);
  let shown;

  // A little from the right and from above, and all of the cell in the picture.
  function camera({x, y, z, cell}) {
    const points = x.map((_, atom) => [x[atom], y[atom], z[atom]]);
    for (let corner = 0; cell && corner < 8; corner++) {
      points.push([0, 1, 2].map((axis) =>
        [0, 1, 2].reduce((sum, edge) => sum + (corner >> edge & 1) * cell[3 * edge + axis], 0)));
    }
    const middle = [0, 1, 2].map((axis) => {
      const values = points.map((point) => point[axis]);
      return (Math.min(...values) + Math.max(...values)) / 2;
    });
    const distance = (point) => Math.hypot(...point.map((value, axis) => value - middle[axis]));
    const radius = 0.9 * Math.max(...points.map(distance)) + 1;
    const [u, v, w] = middle.map((value) => -value);
    return {
      center: {x: u, y: v, z: w}, eye: {x: u + 0.4, y: v + 0.3, z: w + 1}, up: {x: 0, y: 1, z: 0},
      zoom: 150 - radius / Math.tan(Math.PI / 18),  // of an opening of 20 degrees, 150 A away
    };
  }

  function dataset(movie) {
    let names;
    const structures = movie.structures.map((structure) => {
      names = structure.names ?? names;
      return {...structure, names, size: names.length};
    });
    const cutoff = 3.5;
    // chemiscope takes values of atoms only beside a list of all atoms
    const environments = 'magmom' in movie.properties && {
      environments: structures.flatMap(({size}, structure) =>
        Array.from({length: size}, (_, center) => ({structure, center, cutoff}))),
    };
    const look = {
      unitCell: movie.periodic, bonds: structures[0].size <= 500, axes: movie.periodic ? 'abc' : 'off',
      keepOrientation: true, playbackDelay: 100, camera: camera(structures[0]),
      environments: {activated: false},
    };
    const settings = {target: 'structure', structure: [look]};
    return {meta: {name: movie.name}, structures, ...environments, properties: movie.properties, settings};
  }

  async function show(movie) {
    get('movie-caption').textContent = movie.caption;
    get('movie-legend').replaceChildren(...movie.elements.map(([symbol, color]) => {
      const entry = document.createElement('span');
      entry.appendChild(document.createElement('i')).style.background = color;
      entry.append(symbol);
      return entry;
    }));
    get('movie-info').style.display = movie.structures.length > 1 ? '' : 'none';
    get('movie-moments').style.display = 'magmom' in movie.properties ? '' : 'none';
    get('movie-by-moment').checked = false;
    try {
      shown?.remove();
      shown = undefined;
      const places = {meta: 'movie-meta', structure: 'movie-structure', info: 'movie-info'};
      shown = window.movie = await Chemiscope.StructureVisualizer.load(places, dataset(movie));
    } catch (error) {
      const reason = error.message ?? error;
      get('movie-structure').textContent = `No picture: this browser's WebGL does not work (${reason}).`;
    }
  }

  const choice = get('movie-name');
  choice.replaceChildren(...movies.map(({name}) => new Option(name)));
  choice.disabled = movies.length === 1;
  choice.addEventListener('change', () => show(movies[choice.selectedIndex]));
  get('movie-by-moment').addEventListener('change', ({target}) => {
    const moments = movies[choice.selectedIndex].properties.magmom.values;
    const max = moments.reduce((largest, moment) => Math.max(largest, moment), 0.01);  // of all frames
    const color = target.checked ? {property: 'magmom', min: 0, max} : {property: 'element'};
    shown?.applySettings({structure: [{color}]});
  });
  show(movies[0]);
});
"""
