// Tables of numbers from 0 to 1 as pictures, one pixel a number, which the style sheet enlarges.

import { colour } from "./dom.js";

/** Draws rows of numbers; NaN stays empty. The colour grows with the square root, so that small numbers can be seen. */
export function drawHeat(canvas, rows) {
  const width = Math.max(...rows.map((row) => row.length));
  canvas.width = width;
  canvas.height = rows.length;
  const [red, green, blue] = colour("--heat");
  const image = new ImageData(width, rows.length);
  rows.forEach((row, y) => {
    for (let x = 0; x < row.length; x += 1) {
      if (Number.isNaN(row[x])) continue;
      image.data.set([red, green, blue, Math.round(255 * Math.sqrt(Math.max(0, Math.min(1, row[x]))))], 4 * (y * width + x));
    }
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Returns the column and row of a picture that a pointer is at. */
export function cellAt(event, canvas) {
  const box = canvas.getBoundingClientRect();
  const place = (offset, length, cells) => Math.max(0, Math.min(cells - 1, Math.floor((offset / length) * cells)));
  return { column: place(event.clientX - box.left, box.width, canvas.width), row: place(event.clientY - box.top, box.height, canvas.height) };
}
