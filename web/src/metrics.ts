/** The hub's own metrics: Prometheus' text format (version 0.0.4) as numbers, and rates of them. */

export interface Sample {
  name: string;
  labels: Record<string, string>;
  value: number;
}

export interface Picture {
  /** Unix milliseconds. */
  at: number;
  samples: Map<string, Sample[]>;
}

const sample = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const label = /(\w+)="((?:[^"\\]|\\.)*)"/g;

export function parse(text: string, at: number): Picture {
  const samples = new Map<string, Sample[]>();
  for (const line of text.split("\n")) {
    if (line === "" || line.startsWith("#")) continue;
    const m = sample.exec(line);
    if (!m) continue;
    const labels: Record<string, string> = {};
    for (const [, k, v] of (m[2] ?? "").matchAll(label)) labels[k!] = v!.replace(/\\(.)/g, (_, c: string) => (c === "n" ? "\n" : c));
    const value = m[3] === "+Inf" ? Infinity : m[3] === "-Inf" ? -Infinity : Number(m[3]);
    const list = samples.get(m[1]!);
    if (list) list.push({ name: m[1]!, labels, value });
    else samples.set(m[1]!, [{ name: m[1]!, labels, value }]);
  }
  return { at, samples };
}

type Where = Record<string, string>;
const matches = (s: Sample, where: Where) => Object.entries(where).every(([k, v]) => s.labels[k] === v);

/** The sum of a metric's samples with these labels; undefined where there is none. */
export function sum(p: Picture, name: string, where: Where = {}): number | undefined {
  const found = p.samples.get(name)?.filter((s) => matches(s, where));
  return found?.length ? found.reduce((n, s) => n + s.value, 0) : undefined;
}

/** By how much a counter rose in a second; undefined where it is not there, or began anew with the process. */
export function rate(a: Picture, b: Picture, name: string, where: Where = {}): number | undefined {
  const [from, to] = [sum(a, name, where), sum(b, name, where)];
  if (from === undefined || to === undefined || to < from || b.at <= a.at) return undefined;
  return (1000 * (to - from)) / (b.at - a.at);
}

/** A quantile of what a histogram counted between two pictures, in the metric's unit; as exact as its buckets. */
export function quantile(a: Picture, b: Picture, name: string, q: number, where: Where = {}): number | undefined {
  const buckets = new Map<number, number>();
  for (const [p, sign] of [[a, -1], [b, 1]] as const)
    for (const s of p.samples.get(`${name}_bucket`) ?? [])
      if (matches(s, where)) {
        const le = s.labels["le"] === "+Inf" ? Infinity : Number(s.labels["le"]);
        buckets.set(le, (buckets.get(le) ?? 0) + sign * s.value);
      }
  const all = [...buckets].sort((x, y) => x[0] - y[0]);
  const total = all.at(-1)?.[1] ?? 0;
  if (total <= 0) return undefined;
  let [below, count] = [0, 0];
  for (const [le, n] of all) {
    if (n >= q * total) return le === Infinity ? below : below + ((le - below) * (q * total - count)) / Math.max(n - count, 1e-9);
    [below, count] = [le, n];
  }
  return below;
}
