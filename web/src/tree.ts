/** Resources of a device as a tree by the segments of their hrefs. */

export interface Node {
  /** The href so far. */
  path: string;
  /** What is shown of it: a segment, or several where nothing branches off. */
  label: string;
  depth: number;
  /** Whether a resource has just this href. */
  resource: boolean;
  /** How many nodes are directly below. */
  inner: number;
}

interface Branch {
  resource: boolean;
  below: Map<string, Branch>;
}

/**
 * The nodes to show, from top to bottom; what is below a closed one is left out. A branch of which nothing else goes off is
 * written on one line, as /oic/d is where there is no other /oic.
 */
export function nodes(hrefs: Iterable<string>, closed: ReadonlySet<string>): Node[] {
  const root: Branch = { resource: false, below: new Map() };
  for (const href of hrefs) {
    let at = root;
    for (const segment of href.replace(/^\//, "").split("/")) {
      let next = at.below.get(segment);
      if (!next) at.below.set(segment, (next = { resource: false, below: new Map() }));
      at = next;
    }
    at.resource = true;
  }
  const out: Node[] = [];
  const todo: [Branch, string, string, number][] = [];
  const push = (branch: Branch, path: string, depth: number) => {
    const names = [...branch.below.keys()].sort(byNumber).reverse();
    for (const name of names) todo.push([branch.below.get(name)!, `${path}/${name}`, `/${name}`, depth]);
  };
  push(root, "", 0);
  while (todo.length > 0) {
    const next = todo.pop()!;
    const depth = next[3];
    let [branch, path, label] = next;
    while (!branch.resource && branch.below.size === 1) {
      const [name, only] = [...branch.below][0]!;
      branch = only;
      path += `/${name}`;
      label += `/${name}`;
    }
    out.push({ path, label, depth, resource: branch.resource, inner: branch.below.size });
    if (!closed.has(path)) push(branch, path, depth + 1);
  }
  return out;
}

const collator = new Intl.Collator("en", { numeric: true });

function byNumber(a: string, b: string): number {
  return collator.compare(a, b);
}
