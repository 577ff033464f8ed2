/** The resources of a device: a tree to choose from, and the chosen one. */
import { useNavigate, useSearch } from "@tanstack/react-router";
import { useVirtualizer } from "@tanstack/react-virtual";
import { useEffect, useMemo, useRef, useState } from "react";
import { Input, Label, SearchField } from "react-aria-components";
import { ResourceView, type Begun } from "./device-resource";
import type { DeviceStore, Picture } from "./device-store";
import { first } from "./form";
import { texts } from "./texts";
import { nodes, type Node } from "./tree";
import { Loading } from "./ui";
import { briefly } from "./value";
import { line } from "./visible";

const t = texts.device.resources;
const rowHeight = 34;

export function Resources({ deviceId, store, picture }: { deviceId: string; store: DeviceStore; picture: Picture }) {
  const { href: asked = "" } = useSearch({ from: "/devices/$id" });
  const navigate = useNavigate();
  const [words, setWords] = useState("");
  const [closed, setClosed] = useState<ReadonlySet<string>>(new Set());
  const [begun, setBegun] = useState<Readonly<Record<string, Begun>>>({});
  const hrefs = useMemo(() => [...new Set([...picture.links.keys(), ...picture.twins.keys()])].sort(), [picture.links, picture.twins]);
  const matching = useMemo(() => {
    const w = words.toLowerCase().split(/\s+/).filter(Boolean);
    if (w.length === 0) return hrefs;
    return hrefs.filter((h) => {
      const text = `${h} ${(picture.links.get(h)?.resourceTypes ?? []).join(" ")}`.toLowerCase();
      return w.every((x) => text.includes(x));
    });
  }, [hrefs, words, picture.links]);
  const list = matching.join("\n");
  const rows = useMemo(() => nodes(matching, closed), [list, closed]); // values change more often than hrefs
  const href = asked || first(hrefs, picture.links);
  const choose = (h: string) => void navigate({ to: "/devices/$id", params: { id: deviceId }, search: (old) => ({ ...old, href: h }), replace: true });
  if (hrefs.length === 0) return picture.ready ? <p className="empty">{t.none}</p> : <Loading />;
  return (
    <div className="resources">
      <div className="chooser">
        <SearchField className="field" value={words} onChange={setWords}>
          <Label className="hidden">{t.search}</Label>
          <Input placeholder={t.search} spellCheck={false} />
        </SearchField>
        <Tree
          rows={rows} chosen={href} onChoose={choose} closed={closed} onClosed={setClosed}
          hint={(h) => (picture.links.get(h)?.resourceTypes ?? picture.twins.get(h)?.types ?? []).filter((x) => !x.startsWith("oic.wk.col")).join(" ")}
          value={(h) => briefly(picture.twins.get(h)?.content, 60)}
        />
      </div>
      {picture.links.has(href) || picture.twins.has(href) || begun[href] ? (
        <ResourceView
          deviceId={deviceId} store={store} href={href} link={picture.links.get(href)} twin={picture.twins.get(href)} begun={begun[href] ?? {}}
          onBegun={(change) => setBegun((old) => ({ ...old, [href]: change(old[href] ?? {}) }))}
        />
      ) : <p className="empty">{t.gone}</p>}
    </div>
  );
}

/** A tree in the pattern of WAI-ARIA: one stop for the tabulator, arrows inside. */
function Tree({ rows, chosen, onChoose, closed, onClosed, hint, value }: {
  rows: readonly Node[]; chosen: string; onChoose: (path: string) => void; closed: ReadonlySet<string>; onClosed: (c: ReadonlySet<string>) => void;
  hint: (href: string) => string; value: (href: string) => string;
}) {
  const scroll = useRef<HTMLDivElement>(null);
  const [at, setAt] = useState(chosen);
  useEffect(() => setAt(chosen), [chosen]);
  const index = Math.max(0, rows.findIndex((r) => r.path === at));
  const virtual = useVirtualizer({ count: rows.length, getScrollElement: () => scroll.current, estimateSize: () => rowHeight, overscan: 20 });
  const go = (i: number) => {
    const to = Math.max(0, Math.min(rows.length - 1, i));
    if (!rows[to]) return;
    setAt(rows[to].path);
    virtual.scrollToIndex(to);
  };
  const fold = (path: string, shut: boolean) => {
    const next = new Set(closed);
    if (shut) next.add(path);
    else next.delete(path);
    onClosed(next);
  };
  const press = (row: Node) => {
    setAt(row.path);
    if (row.resource) onChoose(row.path);
    else fold(row.path, !closed.has(row.path));
  };
  const key = (e: React.KeyboardEvent) => {
    const row = rows[index];
    if (!row) return;
    const isOpen = row.inner > 0 && !closed.has(row.path);
    if (e.key === "ArrowDown") go(index + 1);
    else if (e.key === "ArrowUp") go(index - 1);
    else if (e.key === "Home") go(0);
    else if (e.key === "End") go(rows.length - 1);
    else if (e.key === "ArrowRight") {
      if (isOpen) go(index + 1);
      else if (row.inner > 0) fold(row.path, false);
    } else if (e.key === "ArrowLeft") {
      if (isOpen) fold(row.path, true);
      else for (let i = index - 1; i >= 0; i--) if (rows[i]!.depth < row.depth) { go(i); break; }
    } else if (e.key === "Enter" || e.key === " ") press(row);
    else return;
    e.preventDefault();
  };
  return (
    <div className="scroll" ref={scroll}>
      <div
        role="tree" aria-label={t.tree} tabIndex={0} onKeyDown={key} aria-activedescendant={rows[index] ? `node-${index}` : undefined}
        style={{ height: virtual.getTotalSize(), position: "relative" }}
      >
        {virtual.getVirtualItems().map(({ index: i, start }) => {
          const row = rows[i]!;
          const shut = closed.has(row.path);
          return (
            <div
              key={row.path} id={`node-${i}`} role="treeitem" aria-level={row.depth + 1} aria-selected={row.path === chosen} {...(row.inner > 0 ? { "aria-expanded": !shut } : {})}
              className={`node${row.path === chosen ? " picked" : ""}${i === index ? " current" : ""}`} style={{ top: start, height: rowHeight, paddingInlineStart: `${0.4 + Math.min(row.depth, 12)}rem` }}
              onClick={() => press(row)}
            >
              <span
                className="fold" aria-hidden="true"
                onClick={(e) => { if (row.inner > 0) { e.stopPropagation(); fold(row.path, !shut); } }}
              >{row.inner > 0 ? (shut ? "▸" : "▾") : ""}</span>
              <bdi className="name">{line(row.label, 120)}</bdi>
              {row.resource && <bdi className="now">{value(row.path)}</bdi>}
              {row.resource && <small className="hint">{line(hint(row.path), 80)}</small>}
            </div>
          );
        })}
      </div>
    </div>
  );
}
