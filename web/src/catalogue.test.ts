import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { catalogue } from "../catalogue";

test("each code is a place on the page, and texts are texts", () => {
  const page = catalogue("# Errors\n\n| code | kind | means |\n|---|---|---|\n| `code-used` | invalid | `<b>` of a \\| b |\n\nend *now*\n");
  expect(page).toContain('<tr id="code-used"><td><code>code-used</code></td><td>invalid</td><td><code>&lt;b></code> of a | b</td></tr>');
  expect(page).toContain("end <em>now</em>");
});

test("the catalogue has all of its codes", () => {
  const text = readFileSync(new URL("../../docs/errors.md", import.meta.url), "utf8");
  const codes = [...text.matchAll(/^\| `([a-z0-9-]+)` \|/gm)].map((m) => m[1]);
  const page = catalogue(text);
  expect(codes.length).toBeGreaterThan(100);
  for (const code of codes) expect(page).toContain(`<tr id="${code}">`);
});
