/** What is asked of a device, with the answer that it, or the hub, gives. */
import { HubError, type App } from "./api";
import type { Verb } from "./device-store";

export interface Order {
  verb: Exclude<Verb, "twin">;
  href: string;
  interface: string;
  /** How long the device has to answer. */
  seconds: number;
  /** CBOR as it is, or anything that is JSON. */
  body?: unknown;
  /** The same for each repeat of one order: it is carried out once. */
  key: string;
}

export interface Answer {
  /** Of the device; "" while there is none, since the order waits for longer than a page should. */
  status: string;
  content: unknown;
}

/** Longer than this nobody waits with the request open: the end comes as an event. */
const longestOpen = 60;
const pause = 1000;

/** Gives an order. A connection that breaks is tried again with the same key, so the device hears of it once. */
export async function order(app: App, deviceId: string, o: Order): Promise<Answer> {
  const begun = Date.now();
  for (let renewed = false; ; ) {
    try {
      return await send(app, deviceId, o);
    } catch (error) {
      if (error instanceof HubError && error.status === 401 && !renewed) {
        renewed = true;
        await app.session.token(true); // waits until somebody has signed in again
      } else if (error instanceof TypeError && Date.now() - begun < 1000 * o.seconds) await new Promise((r) => setTimeout(r, pause));
      else throw error;
    }
  }
}

async function send({ hub: { api } }: App, deviceId: string, o: Order): Promise<Answer> {
  const path = { deviceId, href: o.href.replace(/^\//, "") };
  const query = { timeToLive: String(o.seconds * 1_000_000_000), ...(o.seconds > longestOpen ? { async: true } : {}) };
  const withInterface = o.interface ? { ...query, resourceInterface: o.interface } : query;
  const header = { "Idempotency-Key": o.key };
  const bytes = o.body instanceof Uint8Array;
  const coded = { headers: { "Content-Type": bytes ? "application/cbor" : "application/json" }, bodySerializer: (b: unknown) => (bytes ? (b as BodyInit) : JSON.stringify(b)) };
  switch (o.verb) {
    case "retrieve": {
      const { data } = await api.GET("/api/v1/devices/{deviceId}/resources/{href}", { params: { path, query: { ...withInterface, twin: false }, header }, cache: "no-store" });
      return answer((data as { data?: unknown } | undefined)?.data);
    }
    case "update": {
      const { data } = await api.PUT("/api/v1/devices/{deviceId}/resources/{href}", { params: { path, query: withInterface, header }, body: o.body as string, ...coded });
      return answer((data as { data?: unknown } | undefined)?.data);
    }
    case "create": {
      const { data } = await api.POST("/api/v1/devices/{deviceId}/resource-links/{href}", { params: { path, query, header }, body: o.body as string, ...coded });
      return answer((data as { data?: unknown } | undefined)?.data);
    }
    case "delete": {
      const { data } = await api.DELETE("/api/v1/devices/{deviceId}/resource-links/{href}", { params: { path, query: withInterface, header } });
      return answer((data as { data?: unknown } | undefined)?.data);
    }
  }
}

function answer(data: unknown): Answer {
  const d = (data ?? {}) as { status?: string; content?: unknown };
  return { status: d.status ?? "", content: d.content };
}

/** What the device itself said, of an error that it answered with. */
export function ofDevice(error: unknown): Answer | undefined {
  if (!(error instanceof HubError)) return undefined;
  for (const d of error.details as readonly object[]) if ("status" in d && "resourceId" in d) return answer(d);
  return undefined;
}

/** Takes a command back that has not ended. */
export async function cancel({ hub: { api } }: App, deviceId: string, c: { id: string; verb: Verb; href: string }): Promise<void> {
  if (c.verb === "twin") await api.DELETE("/api/v1/devices/{deviceId}/pending-metadata-updates/{correlationId}", { params: { path: { deviceId, correlationId: c.id } } });
  else {
    await api.DELETE("/api/v1/devices/{deviceId}/resources/{href}/pending-commands/{correlationId}", {
      params: { path: { deviceId, href: c.href.replace(/^\//, ""), correlationId: c.id } },
    });
  }
}
