/** A value as lines, one below the other: so much of it as is open. */
import { entries, isNested, join } from "./paths";

export interface Line {
  path: string;
  key: string;
  depth: number;
  value: unknown;
  /** How many are inside; -1: nothing can be. */
  inner: number;
  open: boolean;
  /** In place of so many more items of the node at this path. */
  rest?: number;
}

const openDepth = 3; // levels that are open at first
const openItems = 60; // a longer list is closed at first
const pieceSize = 200; // items of an open one that are shown before somebody asks for more

/**
 * The lines. toggled are the nodes that somebody opened or closed against what they are at first, more how many pieces of a
 * node are shown beyond the first.
 */
export function lines(value: unknown, toggled: ReadonlySet<string>, more: ReadonlyMap<string, number>): Line[] {
  const out: Line[] = [];
  const todo: Line[] = [{ path: "", key: "", depth: 0, value, inner: isNested(value) ? size(value) : -1, open: false }];
  while (todo.length > 0) {
    const line = todo.pop()!;
    if (line.rest !== undefined || line.inner < 0) {
      out.push(line);
      continue;
    }
    line.open = (line.depth < openDepth && line.inner <= openItems) !== toggled.has(line.path);
    out.push(line);
    if (!line.open) continue;
    const inner = entries(line.value);
    const shown = Math.min(inner.length, pieceSize * (1 + (more.get(line.path) ?? 0)));
    if (shown < inner.length) todo.push({ ...line, depth: line.depth + 1, rest: inner.length - shown });
    for (let i = shown - 1; i >= 0; i--) {
      const [key, v] = inner[i]!;
      todo.push({ path: join(line.path, key), key, depth: line.depth + 1, value: v, inner: isNested(v) ? size(v) : -1, open: false });
    }
  }
  return out;
}

function size(value: object): number {
  return Array.isArray(value) ? value.length : Object.keys(value).length;
}
