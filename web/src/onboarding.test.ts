import { expect, test } from "vitest";
import { decode } from "cborg";
import { hex, qrText, quote, recipes } from "./onboarding";

const o = {
  hubId: "h", deviceId: "d0000000-0000-4000-8000-000000000001", owner: "alice", endpoints: { "coaps+tcp": "coaps+tcp://[::1]:5684", coaps: "coaps://[::1]:5684" },
  authorizationProvider: "coaphub", authorizationCode: "it's", ca: "PEM",
};

test("the body of a sign-up is CBOR", () => {
  const map = { di: o.deviceId, accesstoken: "x".repeat(300), authprovider: "coaphub" };
  expect(decode(Uint8Array.from(hex(map).match(/../g)!, (b) => parseInt(b, 16)))).toEqual(map);
});

test("a word of a shell", () => {
  expect([quote("coaps://hub:5684"), quote("it's"), quote("$(rm)"), quote("")]).toEqual(["coaps://hub:5684", `'it'\\''s'`, "'$(rm)'", "''"]);
});

test("command lines are for what the device has", () => {
  const names = (more: object) => recipes({ ...o, ...more }).map((r) => r.name);
  expect(names({})).toEqual(["iotivity-lite"]); // it has its certificate already
  expect(names({ psk: "k", pskIdentity: "i" })).toEqual(["Simulator", "libcoap", "iotivity-lite"]);
  expect(names({ identity: { chain: "", key: "", ca: "" } })).toEqual(["Simulator", "libcoap", "iotivity-lite"]);
  expect(recipes(o)[0]!.command).toBe(`cloud_server lamp 'it'\\''s' 'coaps+tcp://[::1]:5684' h coaphub`);
});

test("the QR code's text has what the device needs, and no CA", () => {
  expect(JSON.parse(qrText(o))).toEqual({ hubId: "h", deviceId: o.deviceId, endpoint: "coaps+tcp://[::1]:5684", authorizationProvider: "coaphub", authorizationCode: "it's" });
});
