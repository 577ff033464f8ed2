import { describe, expect, it } from "vitest";
import { asCsv, asJson, entryOf, read, series, type Entry } from "./events-of";

const changed = (n: number, content: unknown, href = "/light/1") => ({
  resourceChanged: { resourceId: { deviceId: "d", href }, content, status: "OK", eventMetadata: { timestamp: `${n}000000`, version: String(n), sequence: "0" }, auditContext: { userId: "u" } },
}) as never;
const of = (...all: unknown[]) => all.map((e) => entryOf(e as never)!);

describe("events", () => {
  it("are what they say, in the words of the history", () => {
    expect(entryOf(changed(5, { a: 1 }))).toMatchObject({ ns: "5000000", at: 5, kind: "resourceChanged", href: "/light/1", status: "OK", user: "u", version: "5", value: true });
    expect(entryOf({ resourcePublished: { deviceId: "d", eventMetadata: { timestamp: "1", version: "2", sequence: "0" } } } as never)?.kind).toBe("resourceLinksPublished");
    expect(entryOf({ operationProcessed: {}, resumeToken: "x" } as never)).toBeUndefined();
    expect(entryOf({ deviceMetadataUpdated: { canceled: true, eventMetadata: { timestamp: "1", version: "2", sequence: "0" } } } as never)?.status).toBe("CANCELED");
  });
  it("give a line a field, with gaps", () => {
    const entries = of(changed(1000, { a: 1, on: true }), changed(2000, { a: "x", on: false }), { resourceUpdated: { resourceId: { href: "/light/1" }, content: { a: 7 }, status: "OK", eventMetadata: { timestamp: "2500000000" } } }, changed(3000, { a: 3 }));
    expect(series(entries, ["/a", "/on"])).toEqual([[1, 2, 3], [1, null, 3], [1, 0, null]]);
  });
  it("are saved as tables and as JSON", () => {
    const entries = of(changed(1000, { a: 1, b: { c: "x,y" } }), changed(2000, { a: 2 }), changed(3000, 5, "/n"));
    expect(asCsv(entries, "value").split("\r\n")).toEqual([
      "time,unixNanoseconds,event,href,status,user,version,a,b / c,value",
      '1970-01-01T00:00:01.000Z,1000000000,resourceChanged,/light/1,OK,u,1000,1,"x,y",',
      "1970-01-01T00:00:02.000Z,2000000000,resourceChanged,/light/1,OK,u,2000,2,,",
      "1970-01-01T00:00:03.000Z,3000000000,resourceChanged,/n,OK,u,3000,,,5", "",
    ]);
    const back = JSON.parse(asJson(entries)) as unknown[];
    expect(back[1]).toEqual(changed(2000, { a: 2 }));
    expect(JSON.parse(asJson([]))).toEqual([]);
  });
});

describe("reading", () => {
  const hub = (all: unknown[], asked: unknown[] = []) => ({
    page: async (path: string, { query }: { query: { limit: number; cursor?: string } }) => {
      asked.push({ path, ...query });
      const from = Number(query.cursor ?? 0);
      const to = from + query.limit;
      return { elements: all.slice(from, to), ...(to < all.length ? { cursor: String(to) } : {}) };
    },
  }) as never;
  it("goes on page by page to the end of the span", async () => {
    const all = Array.from({ length: 500 }, (_, i) => changed(i + 1, { v: i }));
    const asked: { limit: number; path: string; timestampFilter: string }[] = [];
    const parts: number[] = [];
    const { entries, cut } = await read({ hub: hub(all, asked) }, "d", { href: "", from: 0, to: 400 }, (e: Entry[]) => parts.push(e.length), () => false);
    expect(entries).toHaveLength(400);
    expect(cut).toBe(false);
    expect(asked[0]).toMatchObject({ limit: 50, path: "/api/v1/devices/{deviceId}/events", timestampFilter: "0" });
    expect(asked[1]!.limit).toBe(1000);
    expect(parts).toEqual([50]);
  });
  it("takes few at once where they are large, and ends before the page gets too heavy", async () => {
    const all = Array.from({ length: 5000 }, (_, i) => changed(i + 1, "x".repeat(256 * 1024)));
    const asked: { limit: number }[] = [];
    const { entries, cut } = await read({ hub: hub(all, asked) }, "d", { href: "/big", from: 0, to: 9999 }, () => undefined, () => false);
    expect(cut).toBe(true);
    expect(entries.length).toBeLessThan(300);
    expect(asked[1]!.limit).toBeLessThanOrEqual(16);
  });
});
