import { expect, test } from "vitest";
import type { Told } from "@coaphub/client";
import { lineOf } from "./events";
import { ago, brief, bytes } from "./format";
import { claimsOf } from "./session";

const told = (e: object) => lineOf(e as Told, 1)!;

test("a line of each kind of event", () => {
  const id = "d0000000-0000-4000-8000-000000000001";
  const changed = told({ resourceChanged: { resourceId: { deviceId: id, href: "/light" }, content: { power: 1 }, status: "OK", eventMetadata: { timestamp: "1700000000123456789" } } });
  expect(changed).toMatchObject({ kind: "RESOURCE_CHANGED", device: id, href: "/light", text: '{"power":1}', at: 1_700_000_000_123 });
  expect(told({ resourceUpdated: { resourceId: { deviceId: id, href: "/x" }, status: "FORBIDDEN", content: null } }).text).toBe("FORBIDDEN null");
  expect(told({ deviceMetadataUpdated: { deviceId: id, connection: { status: "OFFLINE" } } }).text).toBe("OFFLINE");
  expect(told({ resourcePublished: { deviceId: id, resources: [{ href: "/a" }, { href: "/b" }] } }).text).toBe("/a /b");
  expect(lineOf({ operationProcessed: {} } as Told, 1)).toBeUndefined();
});

test("values on one line are cut", () => {
  expect(brief({ a: "x".repeat(300_000) }, 10)).toBe('{"a":"xxxx…');
  expect([brief(undefined), brief("text"), bytes(12), bytes(1_234_567)]).toEqual(["", "text", "12 B", "1.23 MB"]);
  expect(ago(0)).toBe("never");
  expect(ago(1000 - 7_200_000, 1000)).toBe("2 hours ago");
});

test("claims of a token, and of what is none", () => {
  const token = `x.${btoa(JSON.stringify({ sub: "alice", scope: "devices:read" })).replace(/=+$/, "")}.y`;
  expect(claimsOf(token)["sub"]).toBe("alice");
  expect(claimsOf("nonsense")).toEqual({});
});
