import { describe, expect, it } from "vitest";
import { at, drawablePaths, join, leaves, named, put, split } from "./paths";
import { deep } from "./testing/deep";

describe("places in values", () => {
  it("escapes what a pointer means otherwise", () => {
    const path = join(join("", "a/b"), "~1");
    expect(path).toBe("/a~1b/~01");
    expect(split(path)).toEqual(["a/b", "~1"]);
    expect(at({ "a/b": { "~1": 5 } }, path)).toBe(5);
  });
  it("finds own members and items only", () => {
    expect(at([{ x: 1 }], "/0/x")).toBe(1);
    expect(at({}, "/constructor")).toBeUndefined();
    expect(at([1], "/length")).toBeUndefined();
    expect(at(JSON.parse('{"__proto__":{"x":1}}'), "/__proto__/x")).toBe(1);
  });
  it("puts, adds and takes away, and leaves the rest as it was", () => {
    const v = { a: [1, { b: 2 }], c: { d: 3 } };
    const w = put(v, "/a/1/b", 9) as typeof v;
    expect(w).toEqual({ a: [1, { b: 9 }], c: { d: 3 } });
    expect(v.a[1]).toEqual({ b: 2 });
    expect(w.c).toBe(v.c);
    expect(put(v, "/a/0", undefined)).toEqual({ a: [{ b: 2 }], c: { d: 3 } });
    expect(put(v, "/c/d", undefined)).toEqual({ a: [1, { b: 2 }], c: {} });
    expect(put(v, "/a/2", 7)).toEqual({ a: [1, { b: 2 }, 7], c: { d: 3 } });
    expect(put(5, "", 6)).toBe(6);
    const p = put({}, "/__proto__", 1) as object;
    expect(Object.hasOwn(p, "__proto__")).toBe(true);
  });
  it("walks a thousand levels, and a hundred thousand", () => {
    expect(leaves(deep(1000))).toHaveLength(1);
    expect(leaves(deep(20_000), 5)).toHaveLength(1);
    const path = leaves(deep(1000))[0]![0];
    expect(at(deep(1000), path)).toBe(1);
    expect(at(put(deep(1000), path, 2), path)).toBe(2);
  });
  it("finds what can be drawn: numbers, then switches", () => {
    expect(drawablePaths([{ on: true, t: "x" }, { on: false, v: 1, list: [1, "a"] }])).toEqual(["/v", "/list/0", "/on"]);
    expect(drawablePaths([5])).toEqual([""]);
    expect(drawablePaths([{ n: null, s: "1" }])).toEqual([]);
  });
  it("names a place for people", () => {
    expect(named("", "value")).toBe("value");
    expect(named("/a/0/b~1c", "value")).toBe("a / 0 / b/c");
  });
});
