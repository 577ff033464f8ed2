/** What happened to a device, as it is read, shown and saved. */
import type { Event, Told } from "@coaphub/client";
import { millis, type App } from "./api";
import { csv } from "./csv";
import { at, drawable, leaves, named } from "./paths";
import { isOpaque } from "./visible";

export interface Entry {
  /** Orders and tells apart: its time, then its place in the device's history. */
  key: string;
  /** Unix nanoseconds. */
  ns: string;
  /** Unix milliseconds. */
  at: number;
  kind: string;
  href: string;
  status: string;
  user: string;
  version: string;
  content: unknown;
  /** Whether the content is what the resource had from then on. */
  value: boolean;
  /** The event itself, for the details. */
  whole: unknown;
}

// A subscription calls two kinds otherwise than the history does.
const kinds: Record<string, string> = { resourcePublished: "resourceLinksPublished", resourceUnpublished: "resourceLinksUnpublished" };

interface Anything {
  eventMetadata?: { timestamp?: string; version?: string; sequence?: string };
  auditContext?: { userId?: string; correlationId?: string } | null;
  resourceId?: { href: string };
  status?: string;
  content?: unknown;
  canceled?: boolean;
}

/** What an event says; undefined for what belongs to no history. */
export function entryOf(e: Event | Told): Entry | undefined {
  for (const [name, v] of Object.entries(e) as [string, Anything | null][]) {
    if (typeof v !== "object" || v === null || !v.eventMetadata?.timestamp) continue;
    const kind = kinds[name] ?? name;
    const { timestamp: ns, version = "" } = v.eventMetadata;
    const href = v.resourceId?.href ?? "";
    return {
      key: `${ns} ${kind} ${href} ${version} ${v.auditContext?.correlationId ?? ""}`, ns, at: millis(ns), kind, href, status: v.status ?? (v.canceled ? "CANCELED" : ""), user: v.auditContext?.userId ?? "",
      version, content: v.content, value: kind === "resourceChanged", whole: v,
    };
  }
  return undefined;
}

export interface Wanted {
  /** "": of the whole device. */
  href: string;
  /** Unix milliseconds; behind from, up to to. */
  from: number;
  to: number;
}

export const mostEvents = 20_000;
const mostWeight = 64 * 1024 * 1024; // of contents, about bytes
const firstPage = 50;
const largestPage = 1000;

/**
 * Reads events in their order, page by page: small ones first, for each may carry a quarter of a megabyte. It tells what it has
 * so far, and ends where the page would get too heavy: cut says so.
 */
export async function read({ hub }: Pick<App, "hub">, deviceId: string, w: Wanted, soFar: (entries: Entry[]) => void, ended: () => boolean): Promise<{ entries: Entry[]; cut: boolean }> {
  const entries: Entry[] = [];
  let weight = 0;
  let limit = firstPage;
  for (let cursor: string | undefined; ; ) {
    const query = { timestampFilter: String(BigInt(Math.max(0, Math.floor(w.from))) * 1_000_000n), limit, ...(cursor ? { cursor } : {}) };
    const page = w.href === ""
      ? await hub.page("/api/v1/devices/{deviceId}/events", { path: { deviceId }, query })
      : await hub.page("/api/v1/devices/{deviceId}/resources/{href}/events", { path: { deviceId, href: w.href.replace(/^\//, "") }, query });
    if (ended()) return { entries, cut: false };
    let of = 0;
    for (const e of page.elements) {
      const entry = entryOf(e);
      if (!entry) continue;
      if (entry.at > w.to) return { entries, cut: false };
      entries.push(entry);
      of += heaviness(entry.content);
    }
    weight += of;
    if (page.error) throw page.error;
    cursor = page.cursor;
    if (!cursor) return { entries, cut: false };
    if (entries.length >= mostEvents || weight >= mostWeight) return { entries, cut: true };
    soFar(entries);
    const each = Math.max(1, of / Math.max(1, page.elements.length));
    limit = Math.max(10, Math.min(largestPage, Math.floor((4 * 1024 * 1024) / each)));
  }
}

/** About how many bytes a content is here. */
function heaviness(content: unknown): number {
  if (typeof content !== "object" || content === null) return typeof content === "string" ? content.length : 8;
  let n = 0;
  for (const [path, v] of leaves(content)) n += path.length + (typeof v === "string" ? v.length : 8);
  return n;
}

/** What a chart draws: times in seconds, and a line a field. Only what the resource had; a gap where it has no such number. */
export function series(entries: readonly Entry[], paths: readonly string[]): [number[], ...(number | null)[][]] {
  const values = entries.filter((e) => e.value);
  return [values.map((e) => e.at / 1000), ...paths.map((p) => values.map((e) => drawable(at(e.content, p))))];
}

const mostColumns = 200;

/** A table: what is said of each event, then a column for each place that any content has. */
export function asCsv(entries: readonly Entry[], root: string): string {
  const places = new Set<string>();
  const flat = entries.map((e) => {
    const here = e.content === undefined ? [] : isOpaque(e.content) ? leaves(e.content) : leaves(e.content, mostColumns);
    for (const [p] of here) if (places.size < mostColumns) places.add(p);
    return new Map(here);
  });
  const columns = [...places];
  const header = ["time", "unixNanoseconds", "event", "href", "status", "user", "version", ...columns.map((p) => named(p, root))];
  return csv(header, rows(entries, flat, columns));
}

function* rows(entries: readonly Entry[], flat: readonly ReadonlyMap<string, unknown>[], columns: readonly string[]): Generator<unknown[]> {
  for (const [i, e] of entries.entries()) yield [new Date(e.at).toISOString(), e.ns, e.kind, e.href, e.status, e.user, e.version, ...columns.map((c) => flat[i]!.get(c))];
}

export function asJson(entries: readonly Entry[]): string {
  return `[\n${entries.map((e) => JSON.stringify({ [e.kind]: e.whole })).join(",\n")}\n]\n`;
}
