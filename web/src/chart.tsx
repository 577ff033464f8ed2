/** A chart of numbers over time. */
import { useEffect, useRef } from "react";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";

export interface Series {
  label: string;
  values: (number | null)[];
}

const colours = ["--series-1", "--series-2", "--series-3", "--series-4"];

export function Chart({ title, at, series, unit = "", height = 200, onZoom }: {
  title: string; /** Unix milliseconds. */ at: number[]; series: Series[]; unit?: string; height?: number; onZoom?: (from: number, to: number) => void;
}) {
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot>(undefined);
  const zoom = useRef(onZoom);
  zoom.current = onZoom;
  const names = series.map((s) => s.label).join("\n");
  useEffect(() => {
    const el = box.current!;
    const css = getComputedStyle(el);
    const colour = (name: string) => css.getPropertyValue(name).trim() || "#888";
    const axis = { stroke: colour("--soft-now"), grid: { stroke: colour("--line-now") }, ticks: { stroke: colour("--line-now") } };
    const u = new uPlot(
      {
        width: el.clientWidth, height, ms: 1,
        series: [{}, ...series.map((s, i) => ({ label: s.label, stroke: colour(colours[i % colours.length]!), width: 1.5, value: (_: uPlot, v: number | null) => (v === null ? "–" : `${short(v)}${unit}`) }))],
        axes: [axis, { ...axis, size: 64, values: (_: uPlot, v: number[]) => v.map((n) => `${short(n)}${unit}`) }],
        hooks: { setSelect: [(u) => u.select.width > 0 && zoom.current?.(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x"))] },
      },
      [at, ...series.map((s) => s.values)], el,
    );
    plot.current = u;
    const size = new ResizeObserver(() => u.setSize({ width: el.clientWidth, height }));
    size.observe(el);
    return () => {
      size.disconnect();
      u.destroy();
    };
    // What is drawn is set below; a chart with other lines is another chart.
  }, [names, unit, height]);
  useEffect(() => plot.current?.setData([at, ...series.map((s) => s.values)]), [at, series]);
  const last = series.map((s) => `${s.label} ${short(s.values.findLast((v) => v !== null) ?? 0)}${unit}`).join(", ");
  return <figure className="chart"><figcaption>{title}</figcaption><div ref={box} role="img" aria-label={`${title}: ${last}`} /></figure>;
}

/** Three significant digits. */
export function short(n: number): string {
  const a = Math.abs(n);
  if (a >= 1e9) return `${+(n / 1e9).toPrecision(3)} G`;
  if (a >= 1e6) return `${+(n / 1e6).toPrecision(3)} M`;
  if (a >= 1e4) return `${+(n / 1e3).toPrecision(3)} k`;
  return String(+n.toPrecision(3));
}
