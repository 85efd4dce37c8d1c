// Painting a mask over a picture: what is painted is to be drawn anew.

/** A canvas, or a picture of so many pixels, as a PNG file. */
export function png(picture, width = picture.width, height = picture.height) {
  let page = picture;
  if (!(picture instanceof HTMLCanvasElement)) {
    page = Object.assign(document.createElement("canvas"), { width, height });
    page.getContext("2d").drawImage(picture, 0, 0);
  }
  return new Promise((resolve, reject) => page.toBlob((blob) => (
    blob ? resolve(blob) : reject(new Error("This picture is too large for the browser. Make it smaller first."))
  ), "image/png"));
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const PACE = { fine: 1 / 100, coarse: 1 / 10 }; // of the longer side, a key

/** With a pointer; or with arrow keys, and the space bar, which puts the brush down and lifts it. */
export class Painter {
  constructor(canvas, brush, ring) {
    this.canvas = canvas;
    this.brush = brush;
    this.ring = ring;
    this.pen = canvas.getContext("2d");
    this.reset(canvas.width, canvas.height);
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.#lift();
      this.#move(this.#under(event));
      this.#put();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons === 0) this.#lift();
      this.#move(this.#under(event));
    });
    for (const name of ["pointerup", "pointercancel", "blur"]) canvas.addEventListener(name, () => this.#lift());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    brush.addEventListener("input", () => this.#show());
  }

  /** Begins anew over a picture of so many pixels. */
  reset(width, height) {
    this.canvas.width = width;
    this.canvas.height = height;
    this.at = [width / 2, height / 2];
    this.strokes = [];
    this.#lift();
    this.#show();
  }

  clear() {
    this.reset(this.canvas.width, this.canvas.height);
  }

  /** Takes the last stroke back. */
  undo() {
    this.#lift();
    this.strokes.pop();
    this.pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    for (const { width, points } of this.strokes) {
      points.forEach((to, i) => this.#line(width, points[Math.max(i - 1, 0)], to));
    }
  }

  get touched() {
    return this.strokes.length > 0;
  }

  /** A PNG of the picture's size, transparent where it is painted; null where nothing is. */
  async png() {
    if (!this.touched) return null;
    const { width, height } = this.canvas;
    const mask = Object.assign(document.createElement("canvas"), { width, height });
    const pen = mask.getContext("2d");
    pen.fillRect(0, 0, width, height);
    pen.globalCompositeOperation = "destination-out";
    pen.drawImage(this.canvas, 0, 0);
    return png(mask);
  }

  #under(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.canvas.width,
      ((event.clientY - box.top) / box.height) * this.canvas.height,
    ];
  }

  #key(event) {
    const withControl = event.ctrlKey || event.metaKey;
    if (event.key === "z" && withControl) this.undo();
    else if (withControl || event.altKey) return;
    else if (event.key === " ") {
      if (!event.repeat) this.stroke ? this.#lift() : this.#put();
    } else if (event.key in MOVES) {
      const step = this.#longer() * (event.shiftKey ? PACE.coarse : PACE.fine);
      const limits = [this.canvas.width, this.canvas.height];
      this.#move(this.at.map((x, i) => Math.min(Math.max(x + MOVES[event.key][i] * step, 0), limits[i])));
    } else return;
    event.preventDefault();
  }

  #put() {
    this.stroke = { width: (Number(this.brush.value) / 100) * this.#longer(), points: [this.at] };
    this.strokes.push(this.stroke);
    this.#line(this.stroke.width, this.at, this.at);
  }

  #lift() {
    this.stroke = null;
  }

  #move(to) {
    if (this.stroke) {
      this.#line(this.stroke.width, this.at, to);
      this.stroke.points.push(to);
    }
    this.at = to;
    this.#show();
  }

  #line(width, from, to) {
    this.pen.strokeStyle = this.pen.fillStyle = "#ff2d87";
    this.pen.lineWidth = width;
    this.pen.beginPath();
    this.pen.moveTo(...from);
    this.pen.lineTo(...to);
    this.pen.stroke();
    this.pen.beginPath(); // a line to where it began would be none, whatever its cap
    this.pen.arc(...to, width / 2, 0, 2 * Math.PI);
    this.pen.fill();
  }

  #show() {
    const percent = (part, whole) => `${(100 * part) / whole}%`;
    this.ring.style.left = percent(this.at[0], this.canvas.width);
    this.ring.style.top = percent(this.at[1], this.canvas.height);
    this.ring.style.width = percent((Number(this.brush.value) / 100) * this.#longer(), this.canvas.width);
  }

  #longer() {
    return Math.max(this.canvas.width, this.canvas.height);
  }
}
