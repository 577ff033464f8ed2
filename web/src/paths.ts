/**
 * Places in values, as JSON Pointers (RFC 6901). Nothing here calls itself: a device may nest a thousand levels deep, and the
 * page must not fall over it.
 */

export function join(parent: string, key: string | number): string {
  return `${parent}/${String(key).replace(/~/g, "~0").replace(/\//g, "~1")}`;
}

export function split(path: string): string[] {
  return path.split("/").slice(1).map((k) => k.replace(/~1/g, "/").replace(/~0/g, "~"));
}

export function isNested(value: unknown): value is Record<string, unknown> | unknown[] {
  return typeof value === "object" && value !== null && !(value instanceof Uint8Array);
}

/** Members of an object, items of a list; of anything else nothing. */
export function entries(value: unknown): [string, unknown][] {
  if (Array.isArray(value)) return value.map((v, i) => [String(i), v]);
  return isNested(value) ? Object.entries(value) : [];
}

export function member(value: unknown, key: string): unknown {
  if (Array.isArray(value)) return /^(0|[1-9]\d*)$/.test(key) ? value[Number(key)] : undefined;
  return isNested(value) && Object.hasOwn(value, key) ? (value as Record<string, unknown>)[key] : undefined;
}

export function at(value: unknown, path: string): unknown {
  let v = value;
  for (const key of split(path)) v = member(v, key);
  return v;
}

/** The value with another one at a place; what is not on the way there is shared. undefined takes the place away. */
export function put(value: unknown, path: string, to: unknown): unknown {
  const keys = split(path);
  const way: unknown[] = [value];
  for (const key of keys.slice(0, -1)) way.push(member(way.at(-1), key));
  let v = to;
  for (let i = keys.length - 1; i >= 0; i--) {
    const old = way[i];
    const key = keys[i]!;
    if (Array.isArray(old)) {
      const copy = [...(old as unknown[])];
      if (v === undefined) copy.splice(Number(key), 1);
      else copy[Number(key)] = v;
      v = copy;
    } else {
      const members = isNested(old) ? Object.entries(old) : [];
      const here = members.findIndex(([k]) => k === key);
      if (v === undefined) members.splice(here, here < 0 ? 0 : 1);
      else if (here < 0) members.push([key, v]);
      else members[here] = [key, v];
      v = Object.fromEntries(members); // defines members, also one named __proto__
    }
  }
  return v;
}

/** Each value that holds no others, with its place, in order; at most so many. */
export function leaves(value: unknown, most = 10_000): [string, unknown][] {
  const out: [string, unknown][] = [];
  const todo: [string, unknown][] = [["", value]];
  while (todo.length > 0 && out.length < most) {
    const [path, v] = todo.pop()!;
    const inner = entries(v);
    if (inner.length === 0) out.push([path, v]);
    else for (let i = inner.length - 1; i >= 0; i--) todo.push([join(path, inner[i]![0]), inner[i]![1]]);
  }
  return out;
}

/** A number to draw: what is on or off is 1 or 0. */
export function drawable(value: unknown): number | null {
  if (typeof value === "number") return Number.isFinite(value) ? value : null;
  return typeof value === "boolean" ? Number(value) : null;
}

/** The places that have something to draw in any of the values: numbers first, then switches, as they come. */
export function drawablePaths(values: Iterable<unknown>, most = 200): string[] {
  const kinds = new Map<string, "number" | "boolean">();
  for (const value of values) {
    for (const [path, v] of leaves(value, 1000)) {
      if (drawable(v) === null) continue;
      if (typeof v === "number") kinds.set(path, "number");
      else if (!kinds.has(path)) kinds.set(path, "boolean");
    }
    if (kinds.size >= most) break;
  }
  const all = [...kinds];
  return [...all.filter(([, k]) => k === "number"), ...all.filter(([, k]) => k === "boolean")].slice(0, most).map(([p]) => p);
}

/** How a place is called on a page. */
export function named(path: string, root: string): string {
  return path === "" ? root : split(path).join(" / ");
}
