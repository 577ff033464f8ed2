/**
 * All devices of the person, as rows: read page by page, then kept right by events. 100 000 of them fit, since only what the
 * list shows is kept; with all of them here, search, filters and sorting need no waiting.
 */
import type { Told } from "@coaphub/client";
import { millis, rowOf, type App, type Row } from "./api";

export interface Fleet {
  rows: readonly Row[];
  online: number;
  /** Reading; so many so far. */
  loading: boolean;
  error: unknown;
}

const pageSize = 1000;
const paintEvery = 150; // ms: between two pictures, however much happens

export class FleetStore {
  readonly #app: App;
  readonly #rows = new Map<string, Row>();
  readonly #heard = new Set<() => void>();
  #snapshot: Fleet = { rows: [], online: 0, loading: true, error: undefined };
  #timer: ReturnType<typeof setTimeout> | undefined;
  #loading = true;
  #error: unknown;
  #stop: (() => void) | undefined;
  #run = 0;
  #wanted = new Set<string>();
  #fetching = false;
  #gone = new Set<string>();

  constructor(app: App) {
    this.#app = app;
  }

  get = (): Fleet => this.#snapshot;

  /** Whoever looks; the first begins reading, and the last ends it. */
  listen = (f: () => void): (() => void) => {
    this.#heard.add(f);
    if (this.#heard.size === 1) this.#begin();
    return () => {
      this.#heard.delete(f);
      if (this.#heard.size === 0) this.#end();
    };
  };

  #begin(): void {
    const run = ++this.#run;
    this.#loading = true;
    this.#error = undefined;
    let begun = false;
    this.#stop = this.#app.live.subscribe(
      { eventFilter: ["REGISTERED", "UNREGISTERED", "DEVICE_METADATA_UPDATED", "RESOURCE_CHANGED"], resourceIdFilter: [], hrefFilter: ["/oic/d", "/oic/p"] },
      {
        told: (e) => this.#told(e),
        live: (lagged) => {
          // The list is read when events are live: what changes meanwhile comes as an event, and nothing falls between.
          if (!begun || lagged) void this.#read(run);
          begun = true;
        },
      },
    );
  }

  #end(): void {
    this.#run++;
    this.#stop?.();
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  async #read(run: number): Promise<void> {
    this.#loading = true;
    this.#gone.clear();
    const seen = new Set<string>();
    try {
      for (let cursor: string | undefined; ; ) {
        const page = await this.#app.hub.page("/api/v1/devices", { query: { limit: pageSize, ...(cursor ? { cursor } : {}) } });
        if (run !== this.#run) return;
        for (const d of page.elements) {
          seen.add(d.id);
          if (!this.#gone.has(d.id)) this.#rows.set(d.id, rowOf(d));
        }
        cursor = page.cursor;
        this.#changed();
        if (!cursor) break;
      }
      for (const id of this.#rows.keys()) if (!seen.has(id)) this.#wanted.add(id);
      void this.#fetch();
      this.#error = undefined;
    } catch (error) {
      this.#error = error;
    }
    this.#loading = false;
    this.#changed();
  }

  #told(e: Told): void {
    if (e.deviceUnregistered) {
      for (const id of e.deviceUnregistered.deviceIds) {
        this.#gone.add(id);
        this.#rows.delete(id);
      }
    } else if (e.deviceRegistered) {
      for (const id of e.deviceRegistered.deviceIds) this.#want(id);
    } else if (e.deviceMetadataUpdated) {
      const m = e.deviceMetadataUpdated;
      const row = this.#rows.get(m.deviceId);
      if (!row) this.#want(m.deviceId);
      else {
        this.#rows.set(row.id, {
          ...row, online: m.connection.status === "ONLINE", connectedAt: millis(m.connection.connectedAt), protocol: m.connection.protocol,
          twin: m.twinEnabled, sync: m.twinSynchronization.state,
        });
      }
    } else if (e.resourceChanged) {
      this.#want(e.resourceChanged.resourceId.deviceId); // its name, perhaps
    }
    this.#changed();
  }

  #want(id: string): void {
    this.#gone.delete(id);
    this.#wanted.add(id);
    void this.#fetch();
  }

  /** Reads devices again of which something changed that events do not say, many at a time. */
  async #fetch(): Promise<void> {
    if (this.#fetching) return;
    this.#fetching = true;
    try {
      while (this.#wanted.size > 0) {
        const ids = [...this.#wanted].slice(0, 50);
        for (const id of ids) this.#wanted.delete(id);
        const missing = new Set(ids);
        const page = await this.#app.hub.page("/api/v1/devices", { query: { deviceIdFilter: ids, limit: ids.length } });
        for (const d of page.elements) {
          missing.delete(d.id);
          if (!this.#gone.has(d.id)) this.#rows.set(d.id, rowOf(d));
        }
        for (const id of missing) this.#rows.delete(id); // it has not said yet who it is, or is gone
        this.#changed();
      }
    } catch (error) {
      this.#error = error;
    } finally {
      this.#fetching = false;
    }
  }

  /** Labels were changed here; there is no event of it. */
  relabel(id: string, labels: Record<string, string>): void {
    const row = this.#rows.get(id);
    if (row) this.#rows.set(id, { ...row, labels });
    this.#changed();
  }

  #changed(): void {
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      const rows = [...this.#rows.values()];
      this.#snapshot = { rows, online: rows.reduce((n, r) => n + Number(r.online), 0), loading: this.#loading, error: this.#error };
      for (const f of this.#heard) f();
    }, paintEvery);
  }
}

export interface Filters {
  words: string;
  status: "" | "online" | "offline";
  type: string;
  label: string;
}

/** The rows that have all words somewhere, and match the filters. */
export function matching(rows: readonly Row[], f: Filters): readonly Row[] {
  const words = f.words.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length === 0 && !f.status && !f.type && !f.label) return rows;
  return rows.filter((r) => {
    if (f.status && r.online !== (f.status === "online")) return false;
    if (f.type && !r.types.includes(f.type)) return false;
    if (f.label && !Object.entries(r.labels).some(([k, v]) => `${k}=${v}` === f.label)) return false;
    if (words.length === 0) return true;
    const text = `${r.name}\n${r.id}\n${r.types.join(" ")}\n${r.model}\n${r.manufacturer}\n${Object.entries(r.labels).map(([k, v]) => `${k}=${v}`).join(" ")}`.toLowerCase();
    return words.every((w) => text.includes(w));
  });
}

/** What can be filtered by, the most frequent first. */
export function facets(rows: readonly Row[]): { types: string[]; labels: string[] } {
  const types = new Map<string, number>();
  const labels = new Map<string, number>();
  const count = (m: Map<string, number>, k: string) => m.set(k, (m.get(k) ?? 0) + 1);
  for (const r of rows) {
    for (const t of r.types) count(types, t);
    for (const [k, v] of Object.entries(r.labels)) count(labels, `${k}=${v}`);
  }
  const top = (m: Map<string, number>) => [...m].sort((a, b) => b[1] - a[1] || a[0].localeCompare(b[0])).slice(0, 200).map(([k]) => k);
  return { types: top(types), labels: top(labels) };
}
