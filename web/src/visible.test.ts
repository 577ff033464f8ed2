import { expect, it } from "vitest";
import { isOpaque, line, visible } from "./visible";

it("shows what cannot be seen, and leaves what can", () => {
  expect(visible("a\u202eb\u0000c\n\u001b[31m\u200b")).toBe("a\\u202eb\\u0000c\n\\u001b[31m\\u200b");
  expect(visible('<img src=x onerror="alert(1)"> שלום 😀')).toBe('<img src=x onerror="alert(1)"> שלום 😀');
  expect(line("a\nb\tc")).toBe("a\\nb\\tc");
  expect(line("x".repeat(300), 10)).toBe(`${"x".repeat(10)}…`);
});

it("knows a content that was not decoded", () => {
  expect(isOpaque({ contentType: "application/octet-stream", coapContentFormat: 42, data: "AAE=" })).toBe(true);
  expect(isOpaque({ coapContentFormat: -1 })).toBe(true);
  expect(isOpaque({ contentType: "x", data: "AAE=" })).toBe(false);
  expect(isOpaque({ coapContentFormat: 42, data: "", more: 1 })).toBe(false);
  expect(isOpaque([])).toBe(false);
});
