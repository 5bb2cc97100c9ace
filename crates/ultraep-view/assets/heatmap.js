// A heat map on a canvas, with a cursor for mouse and keys, and its value in words below.
import { colour, html, penOn, picture, pictureId } from "./dom.js";
import { scaleLegend, viridis } from "./scale.js";

// Where the cursor of a picture was, by its title: a live view that is drawn anew keeps it.
const cursors = new Map();

const LEFT = 46;
const BOTTOM = 18;

// `map`: rows, columns, values (row-major, null for none), rowName(r), columnName(c), scale, describe(r, c), title,
// summary, and open(r, c) where a cell leads somewhere. `square` makes cells as high as wide.
export function heatmap(map) {
  const readout = html("div", { class: "readout", "aria-live": "polite" }, map.hint || "\u00a0");
  const cursor = cursors.get(map.title) || { row: -1, column: -1 };
  cursors.set(map.title, cursor);
  const box = picture((box, width) => {
    const plotWidth = width - LEFT;
    const cellWidth = plotWidth / Math.max(map.columns, 1);
    const cellHeight = map.square
      ? Math.min(cellWidth, 34)
      : Math.min(Math.max(Math.floor(260 / Math.max(map.rows, 1)), 2), 22);
    const usedWidth = map.square ? Math.min(cellWidth, 34) * map.columns : plotWidth;
    const stepX = usedWidth / Math.max(map.columns, 1);
    const height = cellHeight * map.rows + BOTTOM;
    const canvas = html("canvas", {
      id: pictureId(map.title), tabindex: 0, role: map.open ? "button" : "img", "aria-label": `${map.title}. ${map.summary}`,
    });
    const { pen, clear } = penOn(canvas, width, height);
    const paint = () => {
      clear();
      for (let row = 0; row < map.rows; row++) {
        for (let column = 0; column < map.columns; column++) {
          const value = map.values[row * map.columns + column];
          pen.fillStyle = value === null || value === undefined ? colour("nothing") : viridis(map.scale.at(value));
          const gap = cellHeight > 6 && stepX > 6 ? 1 : 0;
          pen.fillRect(LEFT + column * stepX, row * cellHeight, Math.max(stepX - gap, 0.6) + (gap ? 0 : 0.4), cellHeight - gap);
        }
      }
      labels(pen, map, { stepX, cellHeight, height, usedWidth });
      if (cursor.row >= 0 && cursor.row < map.rows && cursor.column < map.columns) {
        pen.lineWidth = 2;
        pen.strokeStyle = colour("ink");
        pen.strokeRect(LEFT + cursor.column * stepX - 1, cursor.row * cellHeight - 1, stepX + 2, cellHeight + 2);
        pen.strokeStyle = colour("paper");
        pen.lineWidth = 1;
        pen.strokeRect(LEFT + cursor.column * stepX, cursor.row * cellHeight, stepX, cellHeight);
      }
    };
    const move = (row, column) => {
      cursor.row = Math.min(Math.max(row, 0), map.rows - 1);
      cursor.column = Math.min(Math.max(column, 0), map.columns - 1);
      readout.textContent = map.describe(cursor.row, cursor.column);
      paint();
    };
    const at = (event) => {
      const bounds = canvas.getBoundingClientRect();
      const column = Math.floor((event.clientX - bounds.left - LEFT) / stepX);
      const row = Math.floor((event.clientY - bounds.top) / cellHeight);
      return row >= 0 && row < map.rows && column >= 0 && column < map.columns ? [row, column] : null;
    };
    canvas.addEventListener("pointermove", (event) => {
      const cell = at(event);
      if (cell && (cell[0] !== cursor.row || cell[1] !== cursor.column)) move(...cell);
      canvas.style.cursor = cell && map.open ? "pointer" : "default";
    });
    canvas.addEventListener("click", (event) => {
      const cell = at(event);
      if (cell && map.open) map.open(...cell);
    });
    canvas.addEventListener("keydown", (event) => {
      const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      const step = steps[event.key];
      if (step) move(cursor.row + step[0], cursor.column + step[1]);
      else if (event.key === "Home") move(cursor.row, 0);
      else if (event.key === "End") move(cursor.row, map.columns - 1);
      else if (event.key === "Enter" && map.open && cursor.row >= 0) map.open(cursor.row, cursor.column);
      else return;
      event.preventDefault();
    });
    paint();
    box.replaceChildren(canvas);
  });
  return html("div", null, box, readout, map.legend === false ? null : scaleLegend(map.scale));
}

function labels(pen, map, { stepX, cellHeight, height, usedWidth }) {
  pen.fillStyle = colour("faint");
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const everyRow = Math.max(Math.ceil(13 / cellHeight), 1);
  for (let row = 0; row < map.rows; row += everyRow) pen.fillText(map.rowName(row), LEFT - 6, (row + 0.5) * cellHeight);
  pen.textBaseline = "alphabetic";
  const wanted = Math.max(Math.floor(usedWidth / 74), 1);
  const everyColumn = Math.max(Math.ceil(map.columns / wanted), 1);
  for (let column = 0; column < map.columns; column += everyColumn) {
    pen.textAlign = column === 0 ? "left" : "center";
    pen.fillText(map.columnName(column), LEFT + (column + (column === 0 ? 0 : 0.5)) * stepX, height - 4);
  }
}
