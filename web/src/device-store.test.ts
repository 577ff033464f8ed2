import { beforeEach, describe, expect, it, vi } from "vitest";
import { DeviceStore } from "./device-store";
import type { Subscription } from "./live";

const meta = (n: number) => ({ timestamp: `${n}000000`, version: String(n), sequence: "0" });
const link = (href: string) => ({ href, deviceId: "d", validUntil: "0", policy: { bitFlags: 3 } });
const changed = (href: string, content: unknown, n = 1) => ({ resourceChanged: { resourceId: { deviceId: "d", href }, content, status: "OK", eventMetadata: meta(n) } });
const asked = (id: string) => ({
  resourceUpdatePending: { resourceId: { deviceId: "d", href: "/a" }, content: 1, auditContext: { correlationId: id, userId: "u" }, eventMetadata: meta(5), validUntil: "9000000" },
});

describe("a device as it is now", () => {
  let sub: Subscription;
  let stop = 0;
  let store: DeviceStore;
  let end: () => void;
  const tell = (...events: object[]) => {
    for (const e of events) sub.told(e as never);
    vi.advanceTimersByTime(150);
    return store.get();
  };
  beforeEach(() => {
    vi.useFakeTimers();
    stop = 0;
    const live = { subscribe: (_: unknown, s: Subscription) => { sub = s; return () => stop++; } };
    store = new DeviceStore({ live } as never, "d");
    end = store.listen(() => undefined);
    return () => vi.useRealTimers();
  });
  it("has the links and values that it was told, and ends its subscription with the last listener", () => {
    let p = tell({ resourcePublished: { deviceId: "d", resources: [link("/a"), link("/b")] } }, changed("/a", 1), changed("/a", 2, 7));
    expect([...p.links.keys()]).toEqual(["/a", "/b"]);
    expect(p.twins.get("/a")).toMatchObject({ content: 2, version: "7", at: 7 });
    p = tell({ resourceUnpublished: { deviceId: "d", hrefs: ["/a"] } });
    expect([...p.links.keys()]).toEqual(["/b"]);
    expect(p.twins.size).toBe(0);
    end();
    expect(stop).toBe(1);
  });
  it("keeps commands until they ended, with who gave them", () => {
    let p = tell(asked("c1"), asked("c2"));
    expect(p.waiting.map((c) => c.id)).toEqual(["c1", "c2"]);
    expect(p.waiting[0]).toMatchObject({ verb: "update", href: "/a", user: "u", since: 5, until: 9 });
    p = tell({ resourceUpdated: { resourceId: { deviceId: "d", href: "/a" }, content: null, status: "FORBIDDEN", auditContext: { correlationId: "c1" }, eventMetadata: meta(8) } });
    expect(p.waiting.map((c) => c.id)).toEqual(["c2"]);
    expect(p.ended[0]).toMatchObject({ id: "c1", status: "FORBIDDEN", user: "u" });
  });
  it("ends a command of the twin with the metadata that answer it", () => {
    let p = tell({ deviceMetadataUpdatePending: { deviceId: "d", twinEnabled: false, auditContext: { correlationId: "t" }, eventMetadata: meta(1), validUntil: "0" } });
    expect(p.waiting[0]).toMatchObject({ verb: "twin", twin: "off" });
    p = tell({ deviceMetadataUpdated: { deviceId: "d", twinEnabled: false, canceled: false, auditContext: { correlationId: "t" }, eventMetadata: meta(2) } });
    expect(p.waiting).toEqual([]);
    expect(p.metadata?.twinEnabled).toBe(false);
  });
  it("begins anew where events were missed, and says when the device is gone", () => {
    tell(changed("/a", 1), asked("c1"));
    sub.live?.(true);
    const p = tell(changed("/b", 1));
    expect([...p.twins.keys()]).toEqual(["/b"]);
    expect(p.waiting).toEqual([]);
    expect(tell({ deviceUnregistered: { deviceIds: ["x"] } }).gone).toBe(false);
    expect(tell({ deviceUnregistered: { deviceIds: ["d"] } }).gone).toBe(true);
  });
});
