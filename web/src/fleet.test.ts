import { expect, test } from "vitest";
import type { Row } from "./api";
import { facets, matching, type Filters } from "./fleet";

const row = (over: Partial<Row>): Row => ({
  id: "d0000000-0000-4000-8000-000000000001", name: "Lamp", types: ["oic.d.light"], model: "", manufacturer: "", online: true, connectedAt: 0, protocol: "COAPS_TCP", twin: true,
  sync: "IN_SYNC", labels: {}, ...over,
});
const any: Filters = { words: "", status: "", type: "", label: "" };
const rows = [row({}), row({ id: "2", name: "Fan", types: ["oic.d.fan"], online: false, labels: { room: "Kitchen" } }), row({ id: "3", name: "Kitchen lamp" })];
const ids = (f: Partial<Filters>) => matching(rows, { ...any, ...f }).map((r) => r.name);

test("all words must be somewhere, in any case", () => {
  expect(ids({})).toEqual(["Lamp", "Fan", "Kitchen lamp"]);
  expect(ids({ words: "KITCHEN" })).toEqual(["Fan", "Kitchen lamp"]);
  expect(ids({ words: "lamp kitchen" })).toEqual(["Kitchen lamp"]);
  expect(ids({ words: "room=kit" })).toEqual(["Fan"]);
  expect(ids({ status: "offline" })).toEqual(["Fan"]);
  expect(ids({ type: "oic.d.light", words: "0001" })).toEqual(["Lamp"]);
  expect(ids({ label: "room=Kitchen" })).toEqual(["Fan"]);
});

test("what can be filtered by, the most frequent first", () => {
  expect(facets(rows)).toEqual({ types: ["oic.d.light", "oic.d.fan"], labels: ["room=Kitchen"] });
});

test("100 000 devices are searched between two frames or so", () => {
  const many = Array.from({ length: 100_000 }, (_, i) => row({ id: String(i), name: `device ${i}` }));
  expect(matching(many, { ...any, words: "device 99999" }).length).toBe(1);
});
