/**
 * One device as it is now: links, twins, commands that wait, and its metadata, all of one subscription that begins with the
 * current state. Between two pictures some time passes, however much happens.
 */
import type { Event, Told, components } from "@coaphub/client";
import { millis, type App } from "./api";

type Schemas = components["schemas"];
export type Link = Schemas["Link"];
type Changed = NonNullable<Schemas["ResourceChanged"]>;
export type Metadata = Schemas["DeviceMetadataUpdated"];

export interface Twin {
  href: string;
  content: unknown;
  status: string;
  /** In base64. */
  etag: string;
  types: readonly string[];
  /** Unix milliseconds. */
  at: number;
  version: string;
}

export type Verb = "create" | "retrieve" | "update" | "delete" | "twin";

export interface Command {
  /** Its correlation ID. */
  id: string;
  verb: Verb;
  /** "" of the twin's. */
  href: string;
  interface: string;
  content: unknown;
  user: string;
  since: number;
  until: number;
  /** What the twin is to do. */
  twin: "on" | "off" | "resync" | "";
}

export interface Ended {
  id: string;
  verb: Verb;
  href: string;
  status: string;
  user: string;
  at: number;
  content: unknown;
}

export interface Picture {
  links: ReadonlyMap<string, Link>;
  twins: ReadonlyMap<string, Twin>;
  waiting: readonly Command[];
  /** That ended while the page was open, the newest first. */
  ended: readonly Ended[];
  metadata: Metadata | undefined;
  /** The device was deleted. */
  gone: boolean;
  refused: string;
  /** What there is, is told; before, nobody knows whether there is anything. */
  ready: boolean;
}

const paintEvery = 100; // ms
const endedKept = 100;

export class DeviceStore {
  readonly #app: App;
  readonly #id: string;
  readonly #links = new Map<string, Link>();
  readonly #twins = new Map<string, Twin>();
  readonly #waiting = new Map<string, Command>();
  #ended: Ended[] = [];
  #metadata: Metadata | undefined;
  #gone = false;
  #refused = "";
  #ready = false;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #stop: (() => void) | undefined;
  readonly #heard = new Set<() => void>();
  readonly #events = new Set<(e: Told) => void>();
  #picture: Picture = { links: new Map(), twins: new Map(), waiting: [], ended: [], metadata: undefined, gone: false, refused: "", ready: false };

  constructor(app: App, id: string) {
    this.#app = app;
    this.#id = id;
  }

  get = (): Picture => this.#picture;

  listen = (f: () => void): (() => void) => {
    this.#heard.add(f);
    if (this.#heard.size === 1) this.#begin();
    return () => {
      this.#heard.delete(f);
      if (this.#heard.size === 0) {
        this.#stop?.();
        clearTimeout(this.#timer);
        this.#timer = undefined;
      }
    };
  };

  /** Is told each event as it comes, also those of the state at the beginning. */
  events(f: (e: Told) => void): () => void {
    this.#events.add(f);
    return () => this.#events.delete(f);
  }

  #begin(): void {
    this.#clear();
    this.#stop = this.#app.live.subscribe(
      { deviceIdFilter: [this.#id], includeCurrentState: true },
      {
        told: (e) => {
          this.told(e);
          for (const f of this.#events) f(e);
        },
        live: (lagged) => {
          if (lagged) this.#clear(); // the state follows
          this.#refused = "";
          this.#ready = true;
          this.#changed();
        },
        refused: (message) => {
          this.#refused = message;
          this.#changed();
        },
      },
    );
  }

  #clear(): void {
    this.#links.clear();
    this.#twins.clear();
    this.#waiting.clear();
  }

  /** Takes one event in. */
  told(e: Told): void {
    if (e.deviceUnregistered?.deviceIds.includes(this.#id)) this.#gone = true;
    else if (e.deviceRegistered?.deviceIds.includes(this.#id)) this.#gone = false;
    else if (e.deviceMetadataUpdated) {
      this.#metadata = e.deviceMetadataUpdated;
      const id = e.deviceMetadataUpdated.auditContext?.correlationId ?? "";
      const command = this.#waiting.get(id);
      if (command?.verb === "twin") this.#end(command, e.deviceMetadataUpdated.canceled ? "CANCELED" : "OK", millis(e.deviceMetadataUpdated.eventMetadata?.timestamp), undefined);
    } else if (e.resourcePublished) for (const link of e.resourcePublished.resources ?? []) this.#links.set(link.href, link);
    else if (e.resourceUnpublished) {
      for (const href of e.resourceUnpublished.hrefs ?? []) {
        this.#links.delete(href);
        this.#twins.delete(href);
      }
    } else if (e.resourceChanged) this.#twins.set(e.resourceChanged.resourceId.href, twinOf(e.resourceChanged));
    else {
      const command = pending(e);
      if (command) this.#waiting.set(command.id, command);
      const ended = end(e);
      if (ended) this.#end(ended, ended.status, ended.at, ended.content);
    }
    this.#changed();
  }

  #end(c: Pick<Ended, "id" | "verb" | "href" | "user">, status: string, at: number, content: unknown): void {
    const user = this.#waiting.get(c.id)?.user ?? c.user;
    this.#waiting.delete(c.id);
    this.#ended = [{ id: c.id, verb: c.verb, href: c.href, status, user, at, content }, ...this.#ended].slice(0, endedKept);
  }

  #changed(): void {
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      this.#picture = {
        links: new Map(this.#links), twins: new Map(this.#twins), waiting: [...this.#waiting.values()], ended: this.#ended, metadata: this.#metadata, gone: this.#gone,
        refused: this.#refused, ready: this.#ready,
      };
      for (const f of this.#heard) f();
    }, paintEvery);
  }
}

export function twinOf(c: Changed): Twin {
  return {
    href: c.resourceId.href, content: c.content, status: c.status, etag: c.etag ?? "", types: c.resourceTypes ?? [], at: millis(c.eventMetadata?.timestamp),
    version: c.eventMetadata?.version ?? "",
  };
}

/** The command that an event, or a line of a list of them, says waits. */
export function pending(e: Told | Event): Command | undefined {
  for (const verb of ["create", "retrieve", "update", "delete"] as const) {
    const c = e[`resource${upper(verb)}Pending`];
    if (!c) continue;
    return {
      id: c.auditContext?.correlationId ?? "", verb, href: c.resourceId.href, interface: c.resourceInterface ?? "", content: c.content, user: c.auditContext?.userId ?? "",
      since: millis(c.eventMetadata?.timestamp), until: millis(c.validUntil), twin: "",
    };
  }
  const m = e.deviceMetadataUpdatePending;
  if (!m) return undefined;
  return {
    id: m.auditContext?.correlationId ?? "", verb: "twin", href: "", interface: "", content: undefined, user: m.auditContext?.userId ?? "",
    since: millis(m.eventMetadata?.timestamp), until: millis(m.validUntil), twin: m.twinForceSynchronization ? "resync" : m.twinEnabled ? "on" : "off",
  };
}

/** The command of a resource that an event says ended. */
export function end(e: Told | Event): Ended | undefined {
  for (const [verb, past] of [["create", "resourceCreated"], ["retrieve", "resourceRetrieved"], ["update", "resourceUpdated"], ["delete", "resourceDeleted"]] as const) {
    const c = e[past];
    if (!c) continue;
    return {
      id: c.auditContext?.correlationId ?? "", verb, href: c.resourceId.href, status: c.status, user: c.auditContext?.userId ?? "", at: millis(c.eventMetadata?.timestamp),
      content: c.content,
    };
  }
  return undefined;
}

function upper<T extends string>(text: T): Capitalize<T> {
  return (text.charAt(0).toUpperCase() + text.slice(1)) as Capitalize<T>;
}
