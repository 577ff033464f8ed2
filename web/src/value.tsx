/** Values as devices have them, of any size and depth: only what is open and in view is on the page. */
import { useVirtualizer } from "@tanstack/react-virtual";
import { decode } from "cborg";
import { useEffect, useMemo, useRef, useState } from "react";
import { toHex } from "./cbor";
import { diff } from "./diff";
import { bytes } from "./format";
import { lines, type Line } from "./rows";
import { texts } from "./texts";
import { Button, Copy, save } from "./ui";
import { fromBase64, isOpaque, line as oneLine, visible, type Opaque } from "./visible";

const t = texts.device.value;

const flashLasts = 1500; // ms, as the style's animation
const lineHeight = 26;
const virtualFrom = 100; // lines
const longText = 300;
const deepestIndent = 24; // levels; deeper ones say their depth

/** What changed lately, as places, and a number that rises with each change. */
function useChanges(value: unknown): { places: ReadonlySet<string>; n: number } {
  const before = useRef(value);
  const [changes, setChanges] = useState<{ places: ReadonlySet<string>; n: number }>({ places: new Set(), n: 0 });
  useEffect(() => {
    if (before.current === value) return;
    const { changes: all } = diff(before.current, value, 200);
    before.current = value;
    if (all.length === 0) return;
    setChanges(({ n }) => ({ places: new Set(all.map((c) => c.path)), n: n + 1 }));
    const timer = setTimeout(() => setChanges(({ n }) => ({ places: new Set(), n })), flashLasts);
    return () => clearTimeout(timer);
  }, [value]);
  return changes;
}

/** A value; parts that change are marked for a moment. To be given a key for each thing whose value it shows. */
export function Value({ value, label }: { value: unknown; label: string }) {
  if (isOpaque(value)) return <Binary content={value} label={label} />;
  return <Structure value={value} label={label} />;
}

function Structure({ value, label }: { value: unknown; label: string }) {
  const [toggled, setToggled] = useState<ReadonlySet<string>>(new Set());
  const [more, setMore] = useState<ReadonlyMap<string, number>>(new Map());
  const [whole, setWhole] = useState<{ path: string; text: string }>();
  const changes = useChanges(value);
  const all = useMemo(() => lines(value, toggled, more), [value, toggled, more]);
  const scroll = useRef<HTMLDivElement>(null);
  const virtual = useVirtualizer({ count: all.length, getScrollElement: () => scroll.current, estimateSize: () => lineHeight, overscan: 20, enabled: all.length > virtualFrom });
  const toggle = (path: string) => setToggled((old) => {
    const next = new Set(old);
    if (!next.delete(path)) next.add(path);
    return next;
  });
  const show = (l: Line, style?: React.CSSProperties) => (
    <ValueLine
      key={`${l.rest === undefined ? "" : "…"}${l.path}${changes.places.has(l.path) ? ` ${changes.n}` : ""}`} line={l} flash={changes.places.has(l.path)} style={style}
      onToggle={() => toggle(l.path)} onMore={() => setMore((old) => new Map(old).set(l.path, (old.get(l.path) ?? 0) + 5))}
      onWhole={(text) => setWhole({ path: l.path, text })}
    />
  );
  return (
    <>
      <div className="value" ref={scroll} tabIndex={0} role="region" aria-label={label}>
        {all.length <= virtualFrom ? (
          <ul>{all.map((l) => show(l))}</ul>
        ) : (
          <ul style={{ height: virtual.getTotalSize(), position: "relative" }}>
            {virtual.getVirtualItems().map((i) => show(all[i.index]!, { position: "absolute", top: i.start, left: 0, right: 0, height: lineHeight }))}
          </ul>
        )}
      </div>
      {whole && (
        <div className="whole">
          <div className="row spread"><code>{oneLine(whole.path || "/", 80)}</code><span className="row"><Copy text={whole.text} /><Button className="small" onPress={() => setWhole(undefined)}>{texts.close}</Button></span></div>
          <pre tabIndex={0}>{visible(whole.text)}</pre>
        </div>
      )}
    </>
  );
}

function ValueLine({ line: l, flash, style, onToggle, onMore, onWhole }: {
  line: Line; flash: boolean; style: React.CSSProperties | undefined; onToggle: () => void; onMore: () => void; onWhole: (text: string) => void;
}) {
  const indent = { paddingInlineStart: `${Math.min(l.depth, deepestIndent)}rem` };
  if (l.rest !== undefined) return <li style={{ ...style, ...indent }}><Button className="small quiet" onPress={onMore}>{t.more(l.rest)}</Button></li>;
  const name = l.depth > 0 && <bdi className="key">{oneLine(l.key, 100)}: </bdi>;
  const deep = l.depth > deepestIndent && <small title={t.depth(l.depth)}>↳{l.depth} </small>;
  if (l.inner < 0) return <li style={{ ...style, ...indent }} className={flash ? "flash" : ""}>{deep}{name}<Scalar value={l.value} onWhole={onWhole} /></li>;
  return (
    <li style={{ ...style, ...indent }} className={flash ? "flash" : ""}>
      {deep}
      <Button className="fold" onPress={onToggle} aria-expanded={l.open} aria-label={`${l.open ? t.fold : t.unfold} ${oneLine(l.key || t.root, 60)}`}>
        <span aria-hidden="true">{l.open ? "▾" : "▸"}</span>
      </Button>
      {name}<small>{Array.isArray(l.value) ? t.items(l.inner) : t.members(l.inner)}</small>
    </li>
  );
}

function Scalar({ value, onWhole }: { value: unknown; onWhole: (text: string) => void }) {
  if (value instanceof Uint8Array) return <code>{`h'${toHex(value.subarray(0, 64)).replace(/ /g, "")}${value.length > 64 ? "…" : ""}'`}</code>;
  if (typeof value !== "string") return <span className={typeof value}>{value === undefined ? t.nothing : String(value)}</span>;
  return (
    <>
      <bdi className="string">“{oneLine(value, longText)}”</bdi>
      {value.length > longText && <Button className="small quiet" onPress={() => onWhole(value)}>{t.all(bytes(value.length))}</Button>}
    </>
  );
}

const firstBytes = 256;

function Binary({ content, label }: { content: Opaque; label: string }) {
  const [whole, setWhole] = useState(false);
  const data = useMemo(() => {
    try {
      return fromBase64(content.data ?? "");
    } catch {
      return new Uint8Array();
    }
  }, [content.data]);
  // The hub decodes no more than so many levels; here it is read all the same.
  const inside = useMemo(() => {
    if (data.length === 0 || !/cbor/.test(content.contentType ?? "")) return undefined;
    try {
      return { value: decode(data, { allowBigInt: true }) as unknown };
    } catch {
      return undefined;
    }
  }, [data, content.contentType]);
  if (data.length === 0) return <p className="loading">{t.empty}</p>;
  return (
    <div className="binary">
      {inside && <Structure value={inside.value} label={label} />}
      <p>{t.binary(bytes(data.length))} {content.contentType && <code>{oneLine(content.contentType, 100)}</code>}</p>
      <pre tabIndex={0} aria-label={t.hex}>{toHex(whole ? data : data.subarray(0, firstBytes), 16)}{!whole && data.length > firstBytes ? "\n…" : ""}</pre>
      <p className="row">
        {data.length > firstBytes && <Button className="small" onPress={() => setWhole(!whole)}>{whole ? t.less : t.all(bytes(data.length))}</Button>}
        <Button className="small" onPress={() => save("content.bin", new Blob([data]))}>{texts.download}</Button>
      </p>
    </div>
  );
}

/** A value on one line of a table. */
export function Brief({ value, most = 120 }: { value: unknown; most?: number }) {
  return <bdi className="brief">{briefly(value, most)}</bdi>;
}

/** No more is looked at than is shown. */
export function briefly(value: unknown, most: number): string {
  if (value === undefined) return "";
  if (isOpaque(value)) return `${value.contentType ?? ""} ${bytes(Math.floor(((value.data ?? "").length * 3) / 4))}`.trim();
  let out = "";
  const todo: (string | { v: unknown })[] = [{ v: value }];
  while (todo.length > 0 && out.length <= most) {
    const next = todo.pop()!;
    if (typeof next === "string") {
      out += next;
      continue;
    }
    const { v } = next;
    if (typeof v === "string") out += JSON.stringify(v.slice(0, most + 1));
    else if (typeof v !== "object" || v === null) out += String(v);
    else {
      const list = Array.isArray(v);
      const inner = list ? v.slice(0, most) : Object.entries(v).slice(0, most);
      todo.push(list ? "]" : "}");
      for (let i = inner.length - 1; i >= 0; i--) {
        if (list) todo.push({ v: inner[i] });
        else {
          const [key, member] = inner[i] as [string, unknown];
          todo.push({ v: member }, `${key.slice(0, most)}: `);
        }
        if (i > 0) todo.push(", ");
      }
      out += list ? "[" : "{";
    }
  }
  return oneLine(out, most);
}
