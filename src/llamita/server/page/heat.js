// Tables of numbers from 0 to 1 as pictures, one pixel a number, which the style sheet enlarges.

import { colour } from "./dom.js";

/** How strong a colour stands for a number from 0 to 1: its square root, say, so that small ones can be seen. */
export function strength(number, power = 1 / 2) {
  return Math.max(0, Math.min(1, number)) ** power;
}

/** Gives an element the colour of a number, and letters that can be read on it (the style sheet says why at 0.83). */
export function tint(element, number) {
  element.style.setProperty("--weight", `${100 * strength(number)}%`);
  element.classList.toggle("strong", strength(number) > 0.83);
}

/** Draws rows of numbers, as strong as their `power`; NaN stays empty. */
export function drawHeat(canvas, rows, power = 1 / 2) {
  const width = Math.max(...rows.map((row) => row.length));
  canvas.width = width;
  canvas.height = rows.length;
  const [red, green, blue] = colour("--heat");
  const image = new ImageData(width, rows.length);
  rows.forEach((row, y) => {
    for (let x = 0; x < row.length; x += 1) {
      if (Number.isNaN(row[x])) continue;
      image.data.set([red, green, blue, Math.round(255 * strength(row[x], power))], 4 * (y * width + x));
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
