import { expect, it } from "vitest";
import { nodes } from "./tree";

const shown = (hrefs: string[], closed: string[] = []) => nodes(hrefs, new Set(closed)).map((n) => `${"  ".repeat(n.depth)}${n.label}${n.resource ? "" : " (folder)"}`);

it("branches by segments, in the order of numbers", () => {
  expect(shown(["/light/10", "/light/2", "/oic/d", "/oic/p", "/switches"])).toEqual(["/light (folder)", "  /2", "  /10", "/oic (folder)", "  /d", "  /p", "/switches"]);
});

it("writes on one line what does not branch, and keeps what is both resource and folder", () => {
  expect(shown(["/a/b/c", "/switches", "/switches/1"])).toEqual(["/a/b/c", "/switches", "  /1"]);
  expect(nodes(["/a/b/c"], new Set())[0]).toEqual({ path: "/a/b/c", label: "/a/b/c", depth: 0, resource: true, inner: 0 });
});

it("leaves out what is closed", () => {
  expect(shown(["/light/1", "/light/2", "/x"], ["/light"])).toEqual(["/light (folder)", "/x"]);
});

it("takes odd hrefs, and a long one", () => {
  expect(nodes(["/", "/a/", "/a//b"], new Set()).filter((n) => n.resource).map((n) => n.path)).toEqual(["/", "/a/", "/a//b"]);
  const long = "/x".repeat(5000);
  expect(nodes([long, `${long}/y`, `${long}/z`], new Set()).map((n) => n.depth)).toEqual([0, 1, 1]);
});
