import { describe, expect, it } from "vitest";
import { leaves } from "./paths";
import { lines } from "./rows";
import { deep } from "./testing/deep";

describe("lines of a value", () => {
  it("shows what is short, and closes what is long", () => {
    const v = { a: 1, b: Array.from({ length: 61 }, (_, i) => i), c: { d: "x" } };
    expect(lines(v, new Set(), new Map()).map((l) => `${l.depth} ${l.path} ${l.inner}`)).toEqual(["0  3", "1 /a -1", "1 /b 61", "1 /c 1", "2 /c/d -1"]);
  });
  it("opens and closes, and goes on where somebody asks for more", () => {
    const v = Array.from({ length: 500 }, (_, i) => i);
    expect(lines(v, new Set(), new Map())).toHaveLength(1);
    const open = lines(v, new Set([""]), new Map());
    expect(open).toHaveLength(202);
    expect(open.at(-1)).toMatchObject({ path: "", rest: 300 });
    expect(lines(v, new Set([""]), new Map([["", 9]]))).toHaveLength(501);
  });
  it("stays small for a thousand levels, and opens them all", () => {
    expect(lines(deep(1000), new Set(), new Map())).toHaveLength(4);
    const keys = leaves(deep(1000))[0]![0].split("/");
    const nodes = keys.map((_, i) => keys.slice(0, i + 1).join("/")).filter((_, i) => i >= 3);
    expect(lines(deep(1000), new Set(nodes), new Map())).toHaveLength(1001);
  });
});
