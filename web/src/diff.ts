/** What is different between two values, place by place. */
import { entries, isNested, join, member } from "./paths";

export interface Change {
  path: string;
  kind: "added" | "removed" | "changed";
  before?: unknown;
  after?: unknown;
}

const absent = Symbol("absent");

/** Whether two values are the same, whatever the order of their members. */
export function same(a: unknown, b: unknown): boolean {
  const todo: [unknown, unknown][] = [[a, b]];
  for (let pair = todo.pop(); pair; pair = todo.pop()) {
    const [x, y] = pair;
    if (Object.is(x, y)) continue;
    if (!isNested(x) || !isNested(y) || Array.isArray(x) !== Array.isArray(y)) return false;
    const inner = entries(x);
    if (inner.length !== entries(y).length) return false;
    for (const [k, v] of inner) {
      if (!Object.hasOwn(y, k)) return false;
      todo.push([v, member(y, k)]);
    }
  }
  return true;
}

/**
 * The changes that make one value of the other, in the order of the first; at most so many. An item that came into a list, or
 * went out of it, is one change, as long as it is in one place.
 */
export function diff(before: unknown, after: unknown, most = 1000): { changes: Change[]; more: boolean } {
  const changes: Change[] = [];
  const todo: [string, unknown, unknown][] = [["", before === undefined ? absent : before, after === undefined ? absent : after]];
  while (todo.length > 0) {
    const [path, a, b] = todo.pop()!;
    if (a === absent && b === absent) continue;
    if (a !== absent && b !== absent && isNested(a) && isNested(b) && Array.isArray(a) === Array.isArray(b)) {
      const pairs = Array.isArray(a) ? items(path, a, b as unknown[]) : members(path, a as Record<string, unknown>, b as Record<string, unknown>);
      for (let i = pairs.length - 1; i >= 0; i--) todo.push(pairs[i]!);
      continue;
    }
    if (Object.is(a, b)) continue;
    if (changes.length === most) return { changes, more: true };
    if (a === absent) changes.push({ path, kind: "added", after: b });
    else if (b === absent) changes.push({ path, kind: "removed", before: a });
    else changes.push({ path, kind: "changed", before: a, after: b });
  }
  return { changes, more: false };
}

function members(path: string, a: Record<string, unknown>, b: Record<string, unknown>): [string, unknown, unknown][] {
  const out: [string, unknown, unknown][] = Object.keys(a).map((k) => [join(path, k), a[k], Object.hasOwn(b, k) ? b[k] : absent]);
  for (const k of Object.keys(b)) if (!Object.hasOwn(a, k)) out.push([join(path, k), absent, b[k]]);
  return out;
}

function items(path: string, a: unknown[], b: unknown[]): [string, unknown, unknown][] {
  if (a.length === b.length) return a.map((v, i) => [join(path, i), v, b[i]]);
  const shorter = Math.min(a.length, b.length);
  let head = 0;
  while (head < shorter && same(a[head], b[head])) head++;
  let tail = 0;
  while (tail < shorter - head && same(a[a.length - 1 - tail], b[b.length - 1 - tail])) tail++;
  const out: [string, unknown, unknown][] = [];
  for (let i = head; i < Math.max(a.length, b.length) - tail; i++)
    out.push([join(path, i), i < a.length - tail ? a[i] : absent, i < b.length - tail ? b[i] : absent]);
  return out;
}
