/** What a device said before: its numbers as a chart, its events as a table, what changed between two of them, and all of it as a file. */
import { useVirtualizer } from "@tanstack/react-virtual";
import { useSearch } from "@tanstack/react-router";
import { useEffect, useMemo, useRef, useState } from "react";
import { useApp } from "./api";
import { Chart, type Range } from "./chart";
import { Difference } from "./difference";
import type { DeviceStore, Picture } from "./device-store";
import { asCsv, asJson, entryOf, mostEvents, read, series, type Entry } from "./events-of";
import { count, time } from "./format";
import { first } from "./form";
import { Moments } from "./moments";
import { drawablePaths, named } from "./paths";
import { texts } from "./texts";
import { Button, Choice, Failure, save, Window } from "./ui";
import { Brief, Value } from "./value";
import { line } from "./visible";

const t = texts.device.history;

const spans = { quarter: 900, hour: 3600, sixHours: 21_600, day: 86_400, week: 604_800, month: 2_592_000 } as const;
type Span = keyof typeof spans;
const liveEvery = 500; // ms between two pictures
const mostLines = 6;

export function History({ deviceId, store, picture, shown }: { deviceId: string; store: DeviceStore; picture: Picture; shown: boolean }) {
  const { href: asked = "" } = useSearch({ from: "/devices/$id" });
  const hrefs = useMemo(() => [...new Set([...picture.links.keys(), ...picture.twins.keys()])].sort(), [picture.links, picture.twins]);
  const [href, setHref] = useState<string | undefined>(undefined);
  const chosen = href ?? (asked || first(hrefs, picture.links));
  const [span, setSpan] = useState<Span>("hour");
  const [end, setEnd] = useState<number>(); // Unix milliseconds; none: now, and on with it
  return (
    <div className="history">
      <div className="filters">
        <Choice label={t.of} value={chosen} onChange={(h) => { setHref(h); }} options={[["", t.everything], ...hrefs.map((h) => [h, line(h, 60)] as const)]} />
        <Choice label={t.span} value={span} onChange={setSpan} options={(Object.keys(spans) as Span[]).map((s) => [s, t.spans[s]] as const)} />
        <span className="row">
          <Button className="small" onPress={() => setEnd((end ?? Date.now()) - 1000 * spans[span])}>{t.earlier}</Button>
          <Button className="small" isDisabled={end === undefined} onPress={() => setEnd(end !== undefined && end + 1000 * spans[span] < Date.now() ? end + 1000 * spans[span] : undefined)}>{t.later}</Button>
          <Button className="small" isDisabled={end === undefined} onPress={() => setEnd(undefined)}>{t.now}</Button>
        </span>
      </div>
      <Stretch key={`${chosen} ${span} ${end}`} deviceId={deviceId} store={store} href={chosen} seconds={spans[span]} end={end} shown={shown} />
      <Moments deviceId={deviceId} hrefs={hrefs} href={chosen} />
    </div>
  );
}

/** The events of one stretch of time; those that come are added, if it goes on to now. */
function useEvents(deviceId: string, store: DeviceStore, href: string, seconds: number, end: number | undefined) {
  const app = useApp();
  const [state, setState] = useState<{ entries: readonly Entry[]; loading: boolean; cut: boolean; error?: unknown }>({ entries: [], loading: true, cut: false });
  const [run, setRun] = useState(0);
  useEffect(() => {
    let over = false;
    let timer: ReturnType<typeof setTimeout> | undefined;
    let entries: Entry[] = [];
    let keys = new Set<string>();
    const come: Entry[] = [];
    let loaded = false;
    const add = () => {
      timer = undefined;
      if (!loaded || over) return;
      const fresh = come.splice(0).filter((e) => !keys.has(e.key));
      if (fresh.length === 0) return;
      for (const e of fresh) keys.add(e.key);
      const oldest = Date.now() - 1000 * seconds;
      entries = [...entries, ...fresh].filter((e) => e.at >= oldest).slice(-mostEvents);
      setState((s) => ({ ...s, entries }));
    };
    const stop = end !== undefined ? undefined : store.events((told) => {
      const e = entryOf(told);
      if (!e || (href !== "" && e.href !== href)) return;
      come.push(e);
      if (come.length > mostEvents) come.shift();
      timer ??= setTimeout(add, liveEvery);
    });
    setState({ entries: [], loading: true, cut: false });
    const to = end ?? Infinity;
    const from = (end ?? Date.now()) - 1000 * seconds;
    read(app, deviceId, { href, from, to }, (part) => !over && setState((s) => ({ ...s, entries: [...part] })), () => over).then(
      (all) => {
        if (over) return;
        entries = all.entries;
        keys = new Set(entries.map((e) => e.key));
        loaded = !all.cut; // what comes now would stand behind a hole
        setState({ entries, loading: false, cut: all.cut });
        add();
      },
      (error: unknown) => !over && setState((s) => ({ ...s, loading: false, error })),
    );
    return () => {
      over = true;
      stop?.();
      clearTimeout(timer);
    };
  }, [app, deviceId, store, href, seconds, end, run]);
  return { ...state, again: () => setRun((n) => n + 1) };
}

function Stretch({ deviceId, store, href, seconds, end, shown }: { deviceId: string; store: DeviceStore; href: string; seconds: number; end: number | undefined; shown: boolean }) {
  const { entries, loading, cut, error, again } = useEvents(deviceId, store, href, seconds, end);
  const [zoom, setZoom] = useState<Range>();
  const [now, setNow] = useState(Date.now);
  useEffect(() => {
    if (end !== undefined || !shown) return;
    const timer = setInterval(() => setNow(Date.now()), 2000);
    return () => clearInterval(timer);
  }, [end, shown]);
  const to = (end ?? Math.max(now, entries.at(-1)?.at ?? 0)) / 1000;
  const whole = useMemo(() => ({ min: to - seconds, max: to }), [to, seconds]);
  const range = zoom ?? whole;
  // Newest first; only what the chart shows, if a part of it was chosen.
  const listed = useMemo(() => {
    const inside = zoom ? entries.filter((e) => e.at / 1000 >= zoom.min && e.at / 1000 <= zoom.max) : entries;
    return [...inside].reverse();
  }, [entries, zoom]);
  const file = `${deviceId}${href.replace(/[^A-Za-z0-9.-]+/g, "-")}`;
  const inOrder = () => [...listed].reverse();
  return (
    <>
      <Failure error={error} retry={again} />
      {href !== "" && <Numbers entries={entries} range={range} whole={whole} onRange={setZoom} zoomed={zoom !== undefined} />}
      <div className="row spread">
        <span className="result" role="status">{loading ? t.loading(count(entries.length)) : t.events(count(listed.length))}{cut && ` ${t.cut}`}</span>
        <span className="row">
          {zoom && <Button className="small" onPress={() => setZoom(undefined)}>{t.wholeSpan}</Button>}
          <Button className="small" isDisabled={listed.length === 0} onPress={() => save(`${file}.csv`, asCsv(inOrder(), t.value), "text/csv")}>{t.csv}</Button>
          <Button className="small" isDisabled={listed.length === 0} onPress={() => save(`${file}.json`, asJson(inOrder()), "application/json")}>{t.json}</Button>
        </span>
      </div>
      {!loading && listed.length === 0 ? <p className="empty">{t.nothing}</p> : <Events entries={listed} />}
    </>
  );
}

/** The fields of the events that are numbers, of which some are drawn. */
function Numbers({ entries, range, whole, onRange, zoomed }: {
  entries: readonly Entry[]; range: Range; whole: Range; onRange: (r: Range | undefined) => void; zoomed: boolean;
}) {
  const paths = useMemo(() => {
    const values = entries.filter((e) => e.value);
    const step = Math.max(1, Math.floor(values.length / 200)); // fields hardly change from one event to the next
    return drawablePaths(values.filter((_, i) => i % step === 0 || i === values.length - 1).map((e) => e.content));
  }, [entries]);
  const known = paths.join("\n");
  const [picked, setPicked] = useState<readonly string[]>();
  const drawn = useMemo(() => (picked ?? paths.slice(0, 1)).filter((p) => paths.includes(p)), [picked, known]);
  const data = useMemo(() => series(entries, drawn), [entries, drawn]);
  const swatches = useRef(new Map<string, HTMLElement>());
  if (paths.length === 0) return <p className="loading">{t.noNumbers}</p>;
  const toggle = (p: string, on: boolean) => setPicked(on ? [...drawn, p].slice(-mostLines) : drawn.filter((x) => x !== p));
  const about = drawn.map((p, i) => {
    const ys = (data[i + 1] as (number | null)[]).filter((y): y is number => y !== null);
    return `${named(p, t.value)}: ${ys.length === 0 ? texts.none : t.about(String(ys.reduce((a, b) => Math.min(a, b))), String(ys.reduce((a, b) => Math.max(a, b))), String(ys.at(-1)))}`;
  });
  const switches = new Set(drawn.filter((_, i) => data[i + 1]!.every((y) => y === null || y === 0 || y === 1)));
  const scale = (by: number) => {
    const middle = (range.min + range.max) / 2;
    const half = (by * (range.max - range.min)) / 2;
    if (2 * half >= whole.max - whole.min) onRange(undefined);
    else onRange({ min: middle - half, max: middle + half });
  };
  const move = (by: number) => {
    const d = by * (range.max - range.min);
    onRange({ min: range.min + d, max: range.max + d });
  };
  return (
    <div className="card">
      <fieldset className="lines">
        <legend className="hidden">{t.fields}</legend>
        {paths.slice(0, 60).map((p) => {
          const i = drawn.indexOf(p);
          return (
            <label key={p}>
              <input type="checkbox" checked={i >= 0} onChange={(e) => toggle(p, e.target.checked)} />
              <span className={i >= 0 ? `swatch line-${i}` : "swatch"} aria-hidden="true" ref={(el) => { if (el) swatches.current.set(p, el); else swatches.current.delete(p); }} />
              <bdi>{line(named(p, t.value), 60)}</bdi>
            </label>
          );
        })}
      </fieldset>
      {drawn.length > 0 && (
        <Chart
          lines={drawn.map((p) => ({ label: p, steps: switches.has(p), colour: () => swatches.current.get(p) }))} data={data} range={range} onRange={onRange}
          label={`${t.chart} ${about.join("; ")}`.slice(0, 1000)}
        />
      )}
      <div className="row spread">
        <small>{about.map((a) => line(a, 200)).join(" · ")}</small>
        <span className="row">
          <Button className="small" aria-label={t.back} isDisabled={!zoomed} onPress={() => move(-0.5)}>◂</Button>
          <Button className="small" aria-label={t.closer} onPress={() => scale(0.5)}>+</Button>
          <Button className="small" aria-label={t.wider} isDisabled={!zoomed} onPress={() => scale(2)}>−</Button>
          <Button className="small" aria-label={t.forward} isDisabled={!zoomed} onPress={() => move(0.5)}>▸</Button>
        </span>
      </div>
      <small>{t.drag}</small>
    </div>
  );
}

const rowHeight = 36;

function Events({ entries }: { entries: readonly Entry[] }) {
  const scroll = useRef<HTMLDivElement>(null);
  const virtual = useVirtualizer({ count: entries.length, getScrollElement: () => scroll.current, estimateSize: () => rowHeight, overscan: 15, getItemKey: (i) => entries[i]!.key });
  const [chosen, setChosen] = useState<readonly Entry[]>([]);
  const [open, setOpen] = useState<Entry>();
  const items = virtual.getVirtualItems();
  const before = items[0]?.start ?? 0;
  const after = virtual.getTotalSize() - (items.at(-1)?.end ?? 0);
  const pick = (e: Entry, on: boolean) => setChosen((old) => (on ? [...old.filter((c) => c.href === e.href), e].slice(-2) : old.filter((c) => c.key !== e.key)));
  const [first, second] = [...chosen].sort((a, b) => (BigInt(a.ns) < BigInt(b.ns) ? -1 : 1));
  return (
    <>
      <p><small>{chosen.length === 0 ? t.pickTwo : chosen.length === 1 ? t.pickOne : ""}</small></p>
      {first && second && (
        <section className="card" aria-label={texts.device.diff.title}>
          <div className="row spread">
            <h2>{t.between(time(first.at), time(second.at))}</h2>
            <Button className="small" onPress={() => setChosen([])}>{texts.close}</Button>
          </div>
          <Difference before={first.content} after={second.content} />
        </section>
      )}
      <div className="scroll events" ref={scroll} tabIndex={0} role="region" aria-label={t.table}>
        <table aria-rowcount={entries.length + 1}>
          <thead><tr aria-rowindex={1}><th className="pick"><span className="hidden">{t.compare}</span></th><th>{t.time}</th><th>{t.kind}</th><th>{t.resource}</th><th>{t.status}</th><th>{t.content}</th></tr></thead>
          <tbody>
            {before > 0 && <tr aria-hidden="true"><td colSpan={6} style={{ height: before, padding: 0 }} /></tr>}
            {items.map((item) => {
              const e = entries[item.index]!;
              const picked = chosen.some((c) => c.key === e.key);
              return (
                <tr key={e.key} aria-rowindex={item.index + 2} className={picked ? "picked" : ""}>
                  <td className="pick">{e.content !== undefined && <input type="checkbox" checked={picked} aria-label={t.pick(time(e.at))} onChange={(x) => pick(e, x.target.checked)} />}</td>
                  <td><Button className="quiet link" onPress={() => setOpen(e)}>{time(e.at)}</Button></td>
                  <td>{t.kinds[e.kind] ?? e.kind}</td>
                  <td><bdi>{line(e.href, 60)}</bdi></td>
                  <td className={e.status === "" || e.status === "OK" ? "" : "bad"}>{texts.device.status[e.status] ?? e.status}</td>
                  <td><Brief value={e.content} most={100} /></td>
                </tr>
              );
            })}
            {after > 0 && <tr aria-hidden="true"><td colSpan={6} style={{ height: after, padding: 0 }} /></tr>}
          </tbody>
        </table>
      </div>
      <Window title={open ? (t.kinds[open.kind] ?? open.kind) : ""} open={open !== undefined} onClose={() => setOpen(undefined)} wide>
        {open && (
          <>
            <p>{time(open.at)} <small>{open.ns}</small></p>
            {open.content !== undefined && <Value value={open.content} label={t.content} />}
            <h3>{texts.details}</h3>
            <Value value={withoutContent(open.whole)} label={texts.details} />
            <p className="buttons"><Button onPress={() => setOpen(undefined)}>{texts.close}</Button></p>
          </>
        )}
      </Window>
    </>
  );
}

function withoutContent(event: unknown): unknown {
  const { content: _, ...rest } = event as Record<string, unknown>;
  return rest;
}
