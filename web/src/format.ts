/** Times, sizes and values as text. */
import { texts } from "./texts";

const day = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const relative = new Intl.RelativeTimeFormat(undefined, { numeric: "auto" });
const number = new Intl.NumberFormat();

export function time(ms: number): string {
  return ms ? day.format(ms) : texts.never;
}

/** How long ago, coarsely. */
export function ago(ms: number, now = Date.now()): string {
  if (!ms) return texts.never;
  const s = (ms - now) / 1000;
  for (const [unit, length] of [["day", 86400], ["hour", 3600], ["minute", 60]] as const)
    if (Math.abs(s) >= length) return relative.format(Math.round(s / length), unit);
  return relative.format(Math.round(s), "second");
}

export function count(n: number): string {
  return number.format(n);
}

export function bytes(n: number): string {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]] as const) if (n >= size) return `${(n / size).toPrecision(3)} ${unit}`;
  return `${n} B`;
}

/** A value on one line, cut off where it gets long. */
export function brief(value: unknown, most = 120): string {
  if (value === undefined) return "";
  // A value may be a quarter of a megabyte: only as much is made as is shown.
  const text = typeof value === "string" ? value : JSON.stringify(value, undefined, undefined) ?? "";
  return text.length > most ? `${text.slice(0, most)}…` : text;
}
