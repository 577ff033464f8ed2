import { describe, expect, it } from "vitest";
import { blank, first, limitsOf, number, readOnly, rebase, toSend, updateInterfaces } from "./form";

describe("what a form may ask for", () => {
  it("knows by the interfaces what nobody sets", () => {
    expect(readOnly(["oic.if.baseline", "oic.if.s"], [])).toBe(true);
    expect(readOnly(["oic.if.baseline", "oic.if.r"], [])).toBe(true);
    expect(readOnly(["oic.if.baseline", "oic.if.a", "oic.if.s"], [])).toBe(false);
    expect(readOnly(["oic.if.baseline"], [])).toBe(false);
    expect(readOnly([], [])).toBe(false);
    expect(readOnly(["oic.if.rw"], ["oic.wk.d"])).toBe(true);
    expect(updateInterfaces(["oic.if.baseline", "oic.if.ll", "oic.if.s", "oic.if.a"])).toEqual(["oic.if.a", "oic.if.baseline"]);
  });
  it("has limits from the type and from the value itself", () => {
    expect(limitsOf({ brightness: 5 }, "brightness", ["oic.r.light.brightness"])).toEqual({ min: 0, max: 100, step: 1 });
    expect(limitsOf({ temperature: 20, range: [5, 30], step: 0.5 }, "temperature", ["oic.r.temperature"])).toEqual({ min: 5, max: 30, step: 0.5 });
    expect(limitsOf({ dimmingSetting: 20, range: "0,255" }, "dimmingSetting", ["oic.r.light.dimming"])).toEqual({ min: 0, max: 255, step: 1 });
    expect(limitsOf({ x: 1, minimum: 0, maximum: 9 }, "x", [])).toEqual({ min: 0, max: 9 });
    expect(limitsOf({ x: 1, range: "a,b" }, "x", [])).toEqual({});
    expect(limitsOf({ units: "C" }, "units", ["oic.r.temperature"])).toEqual({ options: ["C", "F", "K"] });
    expect(limitsOf({ range: [0, 1] }, "range", [])).toEqual({ readOnly: true });
    expect(limitsOf({ x: 1 }, "constructor", ["__proto__", "constructor"])).toEqual({});
  });
  it("reads numbers, and says what is wrong with them", () => {
    expect(number(" 1.5 ", {})).toEqual({ value: 1.5 });
    expect(number("1,5", {})).toEqual({ value: 1.5 });
    expect(number("", {})).toEqual({ problem: "number" });
    expect(number("1e999", {})).toEqual({ problem: "number" });
    expect(number("101", { max: 100 })).toEqual({ problem: "max" });
    expect(number("-1", { min: 0 })).toEqual({ problem: "min" });
    expect(number("0.3", { step: 0.1 })).toEqual({ value: 0.3 });
    expect(number("0.35", { step: 0.1 })).toEqual({ problem: "step" });
  });
});

describe("what is sent", () => {
  it("is what changed", () => {
    expect(toSend({ a: 1, b: { c: 2 }, rt: ["x"] }, { a: 1, b: { c: 3 }, rt: ["x"] }, false)).toEqual({ b: { c: 3 } });
    expect(toSend({ a: 1, b: 2 }, { a: 1, b: 2, n: 3 }, false)).toEqual({ n: 3 });
  });
  it("is all if nothing did, if that is asked for, and of what is no object", () => {
    expect(toSend({ a: 1, b: 2 }, { a: 1, b: 2 }, false)).toEqual({ a: 1, b: 2 });
    expect(toSend({ a: 1, b: 2 }, { a: 5, b: 2 }, true)).toEqual({ a: 5, b: 2 });
    expect(toSend([1, 2], [1, 3], false)).toEqual([1, 3]);
    expect(toSend(undefined, { a: 1 }, false)).toEqual({ a: 1 });
  });
  it("begins a new item as the others are", () => {
    expect(blank({ a: 5, b: "x", c: true, d: [1], e: { f: 1 } })).toEqual({ a: 0, b: "", c: false, d: [], e: {} });
    expect(blank(undefined)).toBe(null);
  });
});

it("shows first what can be changed", () => {
  const links = new Map([["/a", { interfaces: ["oic.if.s"] }], ["/b", { interfaces: ["oic.if.a"] }], ["/oic/d", { interfaces: ["oic.if.rw"] }]]);
  expect(first(["/a", "/b", "/oic/d"], links)).toBe("/b");
  expect(first(["/a", "/oic/d"], links)).toBe("/a");
  expect(first(["/oic/d"], links)).toBe("/oic/d");
  expect(first([], links)).toBe("");
});

it("keeps what was edited upon a newer value, and says when just that moved", () => {
  expect(rebase({ a: 1, b: 1 }, { a: 5, b: 1 }, { a: 1, b: 9, c: 2 })).toEqual({ base: { a: 1, b: 9, c: 2 }, draft: { a: 5, b: 9, c: 2 }, moved: false });
  expect(rebase({ a: 1, b: 1 }, { a: 5, b: 1 }, { a: 2, b: 1 })).toEqual({ base: { a: 1, b: 1 }, draft: { a: 5, b: 1 }, moved: true });
  expect(rebase({ a: 1 }, { a: 1 }, { a: 2 })).toEqual({ base: { a: 2 }, draft: { a: 2 }, moved: false });
  expect(rebase(1, 5, 2)).toEqual({ base: 1, draft: 5, moved: true });
  expect(rebase([1], [1, 2], [1])).toEqual({ base: [1], draft: [1, 2], moved: false });
});
