/** Numbers over time. What a chart shows is in the table of events too, for whoever does not see it. */
import { useEffect, useRef } from "react";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";

export interface Line {
  label: string;
  /** Drawn in steps: what was on stays so until it is off. */
  steps: boolean;
  /** An element of which the colour is taken when it is drawn: it is right in the dark too. */
  colour: () => HTMLElement | undefined;
}

export interface Range {
  min: number;
  max: number;
}

const height = 260;

/** range is what is shown, in seconds; a part of it is chosen by dragging, all of it again by a double click. */
export function Chart({ lines, data, range, onRange, label }: {
  lines: readonly Line[]; data: [number[], ...(number | null)[][]]; range: Range; onRange: (range: Range | undefined) => void; label: string;
}) {
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot>(undefined);
  const now = useRef({ data, range, onRange });
  now.current = { data, range, onRange };
  const made = lines.map((l) => `${l.label}\n${l.steps}`).join("\n\n");
  useEffect(() => {
    const draw = () => {
      plot.current?.destroy();
      const style = getComputedStyle(box.current!);
      const axis = { stroke: style.color, grid: { stroke: style.borderTopColor, width: 1 }, ticks: { stroke: style.borderTopColor, width: 1 } };
      const stepped = uPlot.paths.stepped!({ align: 1 });
      plot.current = new uPlot(
        {
          width: box.current!.clientWidth || 300, height, legend: { show: false }, cursor: { drag: { x: true, y: false, setScale: false }, points: { size: 7 } },
          scales: { x: { time: true, range: () => [now.current.range.min, now.current.range.max] } }, axes: [axis, { ...axis, size: 60 }],
          series: [{}, ...lines.map((l) => ({
            label: l.label, stroke: getComputedStyle(l.colour() ?? box.current!).color, width: 1.5, spanGaps: false, ...(l.steps ? { paths: stepped } : {}),
          }))],
          hooks: {
            setSelect: [(u) => {
              if (u.select.width < 5) return;
              const min = u.posToVal(u.select.left, "x");
              const max = u.posToVal(u.select.left + u.select.width, "x");
              u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
              now.current.onRange({ min, max });
            }],
          },
        },
        now.current.data as uPlot.AlignedData, box.current!,
      );
      plot.current.over.addEventListener("dblclick", () => now.current.onRange(undefined));
    };
    draw();
    const size = new ResizeObserver(() => {
      const width = box.current?.clientWidth ?? 0;
      if (width > 0) plot.current?.setSize({ width, height });
    });
    size.observe(box.current!);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", draw);
    const theme = new MutationObserver(draw);
    theme.observe(document.documentElement, { attributes: true, attributeFilter: ["style"] });
    return () => {
      size.disconnect();
      theme.disconnect();
      dark.removeEventListener("change", draw);
      plot.current?.destroy();
      plot.current = undefined;
    };
    // eslint-disable-next-line -- it is made anew when its lines are others; data and range are set below
  }, [made]);
  useEffect(() => plot.current?.setData(data as uPlot.AlignedData), [data, range.min, range.max]);
  return <div className="plot" ref={box} role="img" aria-label={label} />;
}
