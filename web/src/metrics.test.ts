import { expect, test } from "vitest";
import { parse, quantile, rate, sum } from "./metrics";

const text = (n: number) => `# HELP x_total Something.
# TYPE x_total counter
x_total{route="a",code="2.05"} ${10 * n}
x_total{route="b \\"quoted\\"",code="4.04"} ${n}
gauge ${n / 2}
t_seconds_bucket{le="0.1"} ${8 * n}
t_seconds_bucket{le="0.2"} ${9 * n}
t_seconds_bucket{le="+Inf"} ${10 * n}
`;

test("samples, sums and rates", () => {
  const [a, b] = [parse(text(1), 1000), parse(text(3), 3000)];
  expect(sum(b, "x_total")).toBe(33);
  expect(sum(b, "x_total", { route: 'b "quoted"' })).toBe(3);
  expect(sum(b, "gauge")).toBe(1.5);
  expect(sum(b, "nothing")).toBeUndefined();
  expect(rate(a, b, "x_total", { route: "a" })).toBe(10);
  expect(rate(b, a, "x_total")).toBeUndefined(); // the process began anew
});

test("quantiles of what came between two pictures", () => {
  const [a, b] = [parse(text(1), 1000), parse(text(3), 3000)];
  expect(quantile(a, b, "t_seconds", 0.5)).toBeCloseTo(0.0625);
  expect(quantile(a, b, "t_seconds", 0.85)).toBeCloseTo(0.15);
  expect(quantile(a, b, "t_seconds", 0.99)).toBe(0.2); // above the last bound nobody knows
  expect(quantile(b, b, "t_seconds", 0.5)).toBeUndefined();
});
