import { expect, it } from "vitest";
import { csv } from "./csv";

it("quotes what has commas, quotes and line breaks", () => {
  expect(csv(["a", "b"], [["x,y", 'say "hi"'], ["two\nlines", 5], [true, null], [undefined, { a: [1] }]])).toBe(
    'a,b\r\n"x,y","say ""hi"""\r\n"two\nlines",5\r\ntrue,\r\n,"{""a"":[1]}"\r\n',
  );
});

it("has no formulas, and leaves numbers alone", () => {
  expect(csv(["v"], [["=HYPERLINK(1)"], ["+1"], ["@x"], [-5], ["-5"]])).toBe("v\r\n'=HYPERLINK(1)\r\n'+1\r\n'@x\r\n-5\r\n'-5\r\n");
});
