/** A value that many levels deep, for tests. */
export function deep(levels: number, inner: unknown = 1): unknown {
  let v = inner;
  for (let i = 0; i < levels; i++) v = i % 2 ? [v] : { a: v };
  return v;
}
