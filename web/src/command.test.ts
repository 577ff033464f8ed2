import { describe, expect, it, vi } from "vitest";
import { HubError } from "./api";
import { ofDevice, order, type Order } from "./command";

const update: Order = { verb: "update", href: "/light/1", interface: "oic.if.a", seconds: 60, body: { state: true }, key: "k" };

function app(put: (path: string, init: Record<string, never>) => Promise<unknown>) {
  const renew = vi.fn(async (_refused?: boolean) => "t");
  return { app: { hub: { api: { PUT: put, GET: put, POST: put, DELETE: put } }, session: { token: renew } } as never, renew };
}

describe("an order", () => {
  it("goes with its key, interface and time, as JSON or as the bytes that were written", async () => {
    const seen: Record<string, unknown>[] = [];
    const { app: a } = app(async (path, init) => {
      seen.push({ path, ...(init as object) });
      return { data: { data: { status: "OK", content: { state: true } } } };
    });
    expect(await order(a, "d", update)).toEqual({ status: "OK", content: { state: true } });
    expect(seen[0]).toMatchObject({
      path: "/api/v1/devices/{deviceId}/resources/{href}", headers: { "Content-Type": "application/json" },
      params: { path: { deviceId: "d", href: "light/1" }, query: { timeToLive: "60000000000", resourceInterface: "oic.if.a" }, header: { "Idempotency-Key": "k" } },
    });
    await order(a, "d", { ...update, body: new Uint8Array([0xa0]), seconds: 3600 });
    expect(seen[1]).toMatchObject({ headers: { "Content-Type": "application/cbor" }, params: { query: { async: true } } });
    expect((seen[1]!["bodySerializer"] as (b: unknown) => unknown)(new Uint8Array([0xa0]))).toEqual(new Uint8Array([0xa0]));
    await order(a, "d", { ...update, verb: "retrieve" });
    expect(seen[2]).toMatchObject({ params: { query: { twin: false } } });
  });
  it("is given again with the same key when the connection breaks", async () => {
    vi.useFakeTimers();
    let n = 0;
    const { app: a } = app(async () => {
      if (n++ < 2) throw new TypeError("network");
      return { data: { data: { status: "OK", content: null } } };
    });
    const done = order(a, "d", update);
    await vi.advanceTimersByTimeAsync(3000);
    expect((await done).status).toBe("OK");
    expect(n).toBe(3);
    vi.useRealTimers();
  });
  it("waits for somebody to sign in again, once", async () => {
    let n = 0;
    const { app: a, renew } = app(async () => {
      if (n++ === 0) throw new HubError(401, "token-expired", "over");
      return { data: {} };
    });
    expect(await order(a, "d", update)).toEqual({ status: "", content: undefined });
    expect(renew).toHaveBeenCalledExactlyOnceWith(true);
    const never = app(async () => { throw new HubError(401, "token-expired", "over"); });
    await expect(order(never.app, "d", update)).rejects.toMatchObject({ code: "token-expired" });
  });
  it("that the device refused has the device's own words", () => {
    const details = [{ "@type": "x", resourceId: { deviceId: "d", href: "/a" }, status: "FORBIDDEN", content: { why: "locked" } }];
    expect(ofDevice(new HubError(403, "device-refused", "no", details as never))).toEqual({ status: "FORBIDDEN", content: { why: "locked" } });
    expect(ofDevice(new HubError(504, "command-expired", "late"))).toBeUndefined();
    expect(ofDevice(new Error("x"))).toBeUndefined();
  });
});
