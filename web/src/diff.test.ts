import { describe, expect, it } from "vitest";
import { diff, same } from "./diff";
import { deep } from "./testing/deep";

describe("diff", () => {
  it("says place by place what changed", () => {
    expect(diff({ a: 1, b: { c: "x", d: true }, e: null }, { a: 2, b: { c: "x" }, f: [] }).changes).toEqual([
      { path: "/a", kind: "changed", before: 1, after: 2 },
      { path: "/b/d", kind: "removed", before: true },
      { path: "/e", kind: "removed", before: null },
      { path: "/f", kind: "added", after: [] },
    ]);
  });
  it("sees one item come into a list, and one go", () => {
    expect(diff([1, 2, 3], [1, 9, 2, 3]).changes).toEqual([{ path: "/1", kind: "added", after: 9 }]);
    expect(diff([{ a: 1 }, { a: 2 }, { a: 3 }], [{ a: 1 }, { a: 3 }]).changes).toEqual([{ path: "/1", kind: "removed", before: { a: 2 } }]);
    expect(diff([1, 1], [1, 1, 1]).changes).toHaveLength(1);
  });
  it("takes another kind as one change", () => {
    expect(diff({ a: [1] }, { a: { 0: 1 } }).changes).toEqual([{ path: "/a", kind: "changed", before: [1], after: { 0: 1 } }]);
    expect(diff(1, undefined).changes).toEqual([{ path: "", kind: "removed", before: 1 }]);
    expect(diff(undefined, undefined).changes).toEqual([]);
    expect(diff({ a: 1 }, { a: "1" }).changes).toHaveLength(1);
  });
  it("has no place for the order of members", () => {
    expect(diff({ a: 1, b: 2 }, { b: 2, a: 1 }).changes).toEqual([]);
    expect(same({ a: [1, { b: 2 }] }, { a: [1, { b: 2 }] })).toBe(true);
    expect(same({ a: 1 }, { b: 1 })).toBe(false);
    expect(same([1], { 0: 1 })).toBe(false);
    expect(same(JSON.parse('{"__proto__":1}'), { constructor: 1 })).toBe(false);
  });
  it("goes as deep as a value does, and ends where it is told to", () => {
    expect(diff(deep(1000, 1), deep(1000, 2)).changes).toHaveLength(1);
    expect(same(deep(20_000), deep(20_000))).toBe(true);
    const { changes, more } = diff(Array.from({ length: 50 }, () => 1), Array.from({ length: 50 }, () => 2), 10);
    expect(changes).toHaveLength(10);
    expect(more).toBe(true);
  });
});
