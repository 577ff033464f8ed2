/** The hub this console belongs to, and whoever is signed in: what all pages share. */
import { Hub, HubError, type Device, type Element, type Lists, type paths } from "@coaphub/client";
import { createContext, useContext, useSyncExternalStore } from "react";
import { Live } from "./live";
import type { Session } from "./session";

export { HubError } from "@coaphub/client";
export type { Device, Event, Resource, Told, components } from "@coaphub/client";

export interface App {
  session: Session;
  hub: Hub;
  live: Live;
}

export const AppContext = createContext<App | undefined>(undefined);

export function useApp(): App {
  const app = useContext(AppContext);
  if (!app) throw new Error("outside of the console");
  return app;
}

/** Whether the connection is there, and whether the person is signed in. */
export function useLink(): { link: Live["link"]; state: Session["state"] } {
  const { live, session } = useApp();
  const link = useSyncExternalStore(live.listen, () => live.link);
  const state = useSyncExternalStore(session.listen, () => session.state);
  return { link, state };
}

export function newApp(session: Session): App {
  const url = `${location.origin.replace(/^http/, "ws")}/api/v1/ws/events`;
  // RFC 6455, Section 4.1: a page cannot set headers, so the token is offered as a subprotocol.
  const live = new Live((token) => new WebSocket(url, ["Bearer", token]), session.token);
  return { session, hub: new Hub(location.origin, session.token), live };
}

type Query<P extends Lists> = paths[P] extends { get: { parameters: { query?: infer Q } } } ? NonNullable<Q> : never;

/** A whole list; to be used where it is known to be short. */
export async function all<P extends Lists>(hub: Hub, path: P, query?: Query<P>, at?: Record<string, string>): Promise<Element<P>[]> {
  const out: Element<P>[] = [];
  const parameters = { ...(query ? { query } : {}), ...(at ? { path: at } : {}) };
  for await (const one of hub.list(path, parameters as never)) out.push(one);
  return out;
}

/** The sentence and the code of what went wrong. */
export function wrong(error: unknown): { text: string; code: string } {
  if (error instanceof HubError) return { text: error.message, code: error.code };
  if (error instanceof TypeError) return { text: "The hub could not be reached.", code: "" };
  return { text: error instanceof Error ? error.message : String(error), code: "" };
}

/** Where certificates are listed and revoked. */
export const records = "/certificate-authority/api/v1/signing/records";

/** Why one is revoked (RFC 5280, Section 5.3.1). */
export const reasons = ["unspecified", "keyCompromise", "superseded", "cessationOfOperation"] as const;

/** What a list of devices shows of one. */
export interface Row {
  id: string;
  name: string;
  types: string[];
  model: string;
  manufacturer: string;
  online: boolean;
  /** Unix milliseconds; 0: never. */
  connectedAt: number;
  protocol: string;
  twin: boolean;
  sync: string;
  labels: Record<string, string>;
}

export function rowOf(d: Device): Row {
  const { connection, twinEnabled, twinSynchronization } = d.metadata;
  return {
    id: d.id, name: d.name ?? "", types: d.types ?? [], model: d.modelNumber ?? "", manufacturer: d.manufacturerName?.[0]?.value ?? "",
    online: connection?.status === "ONLINE", connectedAt: millis(connection?.connectedAt), protocol: connection?.protocol ?? "UNKNOWN",
    twin: twinEnabled ?? false, sync: twinSynchronization?.state ?? "OUT_OF_SYNC", labels: d.labels ?? {},
  };
}

/** Unix nanoseconds as text to milliseconds; 0 where there is none. */
export function millis(ns: string | undefined): number {
  return ns ? Number(BigInt(ns) / 1_000_000n) : 0;
}
