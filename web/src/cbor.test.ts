import { expect, it } from "vitest";
import { diagnostic, fromHex, toHex } from "./cbor";

it("reads hexadecimal digits as people write them", () => {
  expect(fromHex("A1 61 61\n01")).toEqual(new Uint8Array([0xa1, 0x61, 0x61, 1]));
  expect(fromHex("0xa1,0x01")).toEqual(new Uint8Array([0xa1, 1]));
  expect(fromHex("a")).toBeUndefined();
  expect(fromHex("zz")).toBeUndefined();
  expect(toHex(new Uint8Array([0, 255, 16]))).toBe("00 ff 10");
  expect(toHex(new Uint8Array(4), 2)).toBe("00 00\n00 00");
});

it("writes diagnostic notation, whole numbers as large as they are", () => {
  expect(diagnostic(fromHex("a3 61 61 1b ff ff ff ff ff ff ff ff 01 82 f5 f6 61 62 42 00 ff")!)).toBe('{"a": 18446744073709551615, 1: [true, null], "b": h\'00ff\'}');
  expect(() => diagnostic(fromHex("a1 61")!)).toThrow();
});

it("reads a thousand levels", () => {
  expect(diagnostic(new Uint8Array([...Array.from({ length: 1000 }, () => 0x81), 1]))).toHaveLength(2001);
});
