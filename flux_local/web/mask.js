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

export class Painter {
  constructor(canvas, brush) {
    this.canvas = canvas;
    this.brush = brush;
    this.pen = canvas.getContext("2d");
    this.touched = false;
    this.last = null;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.last = this.#at(event);
      this.#stroke(this.last);
    });
    canvas.addEventListener("pointermove", (event) => this.last && this.#stroke(this.#at(event)));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (this.last = null));
  }

  /** Begins anew over a picture of so many pixels. */
  reset(width, height) {
    this.canvas.width = width;
    this.canvas.height = height;
    this.touched = false;
  }

  clear() {
    this.reset(this.canvas.width, this.canvas.height);
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

  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.canvas.width,
      ((event.clientY - box.top) / box.height) * this.canvas.height,
    ];
  }

  #stroke(to) {
    this.pen.strokeStyle = "#ff2d87";
    this.pen.lineCap = this.pen.lineJoin = "round";
    this.pen.lineWidth = (Number(this.brush.value) / 100) * Math.max(this.canvas.width, this.canvas.height);
    this.pen.beginPath();
    this.pen.moveTo(...this.last);
    this.pen.lineTo(...to);
    this.pen.stroke();
    this.last = to;
    this.touched = true;
  }
}
