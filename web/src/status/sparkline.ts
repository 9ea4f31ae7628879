/** A line of the last values, drawn by SVG. */

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 48;

export class Sparkline {
  readonly element = document.createElementNS(SVG, "svg");
  readonly #area = document.createElementNS(SVG, "polygon");
  readonly #line = document.createElementNS(SVG, "polyline");

  constructor() {
    this.element.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.element.setAttribute("preserveAspectRatio", "none");
    this.element.setAttribute("class", "sparkline");
    this.element.setAttribute("role", "img");
    this.element.append(this.#area, this.#line);
  }

  update(values: number[], label: string): void {
    const points = pointsOf(values);
    this.#line.setAttribute("points", points.join(" "));
    const last = values.length > 1 ? WIDTH : 0;
    this.#area.setAttribute(
      "points",
      points.length ? `0,${HEIGHT} ${points.join(" ")} ${last},${HEIGHT}` : "",
    );
    this.element.setAttribute("aria-label", label);
  }
}

export function pointsOf(values: number[]): string[] {
  const top = Math.max(1e-9, ...values);
  const step = WIDTH / Math.max(1, values.length - 1);
  return values.map(
    (value, index) =>
      `${(index * step).toFixed(1)},${(HEIGHT - 2 - (value / top) * (HEIGHT - 4)).toFixed(1)}`,
  );
}
