/** What happens to all devices, as it happens. A pause keeps the place: what came meanwhile is read when it ends. */
import { Link } from "@tanstack/react-router";
import { useVirtualizer } from "@tanstack/react-virtual";
import { useEffect, useMemo, useRef, useState, useSyncExternalStore } from "react";
import { useApp, millis, type App, type Told } from "./api";
import { useFleet } from "./devices";
import { brief, count, time } from "./format";
import type { Filter } from "./live";
import { texts } from "./texts";
import { Button, Choice, Copy, Failure, Field, Window } from "./ui";

const t = texts.events;

export interface Line {
  n: number;
  at: number;
  kind: string;
  device: string;
  href: string;
  text: string;
  event: Told;
}

const kinds = {
  resourceChanged: "RESOURCE_CHANGED", deviceMetadataUpdated: "DEVICE_METADATA_UPDATED", resourcePublished: "RESOURCE_PUBLISHED", resourceUnpublished: "RESOURCE_UNPUBLISHED",
  deviceRegistered: "REGISTERED", deviceUnregistered: "UNREGISTERED", resourceUpdatePending: "RESOURCE_UPDATE_PENDING", resourceUpdated: "RESOURCE_UPDATED",
  resourceRetrievePending: "RESOURCE_RETRIEVE_PENDING", resourceRetrieved: "RESOURCE_RETRIEVED", resourceCreatePending: "RESOURCE_CREATE_PENDING", resourceCreated: "RESOURCE_CREATED",
  resourceDeletePending: "RESOURCE_DELETE_PENDING", resourceDeleted: "RESOURCE_DELETED", deviceMetadataUpdatePending: "DEVICE_METADATA_UPDATE_PENDING",
} as const;
type Member = keyof typeof kinds;

/** What a line shows of an event; undefined for what is no event of a device. */
export function lineOf(e: Told, n: number): Line | undefined {
  const member = (Object.keys(kinds) as Member[]).find((k) => e[k]);
  if (!member) return undefined;
  const v = e[member] as {
    deviceId?: string; deviceIds?: string[]; resourceId?: { deviceId: string; href: string }; content?: unknown; status?: string; hrefs?: string[];
    resources?: { href: string }[]; connection?: { status: string }; eventMetadata?: { timestamp?: string };
  };
  const href = v.resourceId?.href ?? "";
  let text = "";
  if (v.connection) text = v.connection.status;
  else if (v.resources) text = v.resources.map((r) => r.href).join(" ");
  else if (v.hrefs) text = v.hrefs.join(" ");
  else text = [v.status && v.status !== "OK" ? v.status : "", brief(v.content, 200)].filter(Boolean).join(" ");
  return { n, at: millis(v.eventMetadata?.timestamp) || Date.now(), kind: kinds[member], device: v.resourceId?.deviceId ?? v.deviceId ?? v.deviceIds?.join(" ") ?? "", href, text, event: e };
}

const most = 5000;

interface Picture {
  lines: readonly Line[];
  paused: boolean;
  /** Some were missed: the hub had no longer kept them. */
  lagged: boolean;
  refused: string;
}

/** The stream of one filter. Paused, it is not subscribed: it goes on from its resume token, so that nothing is missed. */
class Stream {
  readonly #app: App;
  readonly #filter: Filter;
  readonly #heard = new Set<() => void>();
  #picture: Picture = { lines: [], paused: false, lagged: false, refused: "" };
  #lines: Line[] = [];
  #resume = "";
  #n = 0;
  #stop: (() => void) | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor(app: App, filter: Filter) {
    this.#app = app;
    this.#filter = filter;
  }

  get = (): Picture => this.#picture;

  listen = (f: () => void): (() => void) => {
    this.#heard.add(f);
    if (this.#heard.size === 1 && !this.#picture.paused) this.#go();
    return () => {
      this.#heard.delete(f);
      if (this.#heard.size === 0) this.#halt();
    };
  };

  pause(): void {
    this.#halt();
    this.#show({ paused: true });
  }

  resume(): void {
    this.#go();
    this.#show({ paused: false });
  }

  clear(): void {
    this.#lines = [];
    this.#show({ lagged: false });
  }

  #go(): void {
    this.#stop ??= this.#app.live.subscribe({ ...this.#filter, ...(this.#resume ? { resumeToken: this.#resume } : {}) }, {
      told: (e) => {
        const line = lineOf(e, this.#n++);
        if (!line) return;
        this.#lines.push(line);
        if (this.#lines.length > most + 500) this.#lines.splice(0, this.#lines.length - most);
        this.#timer ??= setTimeout(() => {
          this.#timer = undefined;
          this.#show({});
        }, 100);
      },
      live: (lagged) => this.#show({ refused: "", ...(lagged ? { lagged } : {}) }),
      place: (token) => (this.#resume = token),
      refused: (refused) => this.#show({ refused }),
    });
  }

  #halt(): void {
    this.#stop?.();
    this.#stop = undefined;
  }

  #show(change: Partial<Picture>): void {
    this.#picture = { ...this.#picture, ...change, lines: [...this.#lines] };
    for (const f of this.#heard) f();
  }
}

export function EventsPage() {
  const app = useApp();
  const { fleet } = useFleet();
  const [kind, setKind] = useState("");
  const [device, setDevice] = useState("");
  const [href, setHref] = useState("");
  const [words, setWords] = useState("");
  const [shown, setShown] = useState<Line | undefined>();
  const deviceOK = /^[0-9a-f-]{36}$/i.test(device.trim());
  const stream = useMemo(
    () => new Stream(app, {
      ...(kind ? { eventFilter: [kind] } : {}), ...(deviceOK ? { deviceIdFilter: [device.trim().toLowerCase()] } : {}), ...(href.startsWith("/") && href.length > 1 ? { hrefFilter: [href] } : {}),
    }),
    [app, kind, deviceOK ? device : "", href],
  );
  const picture = useSyncExternalStore(stream.listen, stream.get);
  const names = useMemo(() => new Map(fleet.rows.map((r) => [r.id, r.name])), [fleet.rows]);
  const lines = useMemo(() => {
    const w = words.toLowerCase();
    return w ? picture.lines.filter((l) => `${l.device} ${names.get(l.device) ?? ""} ${l.href} ${l.kind} ${l.text}`.toLowerCase().includes(w)) : picture.lines;
  }, [picture.lines, words, names]);
  return (
    <div className="devices">
      <div className="row spread">
        <h1>{t.title}</h1>
        <div className="row">
          {picture.paused
            ? <Button className="primary" onPress={() => stream.resume()}>{t.resume}</Button>
            : <Button onPress={() => stream.pause()}>{t.pause}</Button>}
          <Button onPress={() => stream.clear()}>{t.clear}</Button>
        </div>
      </div>
      <div className="filters" role="search">
        <Choice label={t.kind} hidden value={kind} onChange={setKind} options={[["", t.anyKind], ...Object.values(kinds).map((k) => [k, t.kinds[k] ?? k] as const)]} />
        <Field label={t.device} value={device} onChange={setDevice} />
        <Field label={t.href} value={href} onChange={setHref} />
        <Field label={texts.search} value={words} onChange={setWords} />
        <span className="result" role="status">{picture.paused ? t.paused : t.live} · {t.shown(count(lines.length))}</span>
      </div>
      {picture.lagged && <p className="failure" role="alert">{t.lagged}</p>}
      {picture.refused && <Failure error={new Error(picture.refused)} />}
      {lines.length === 0 ? <p className="empty">{t.empty}</p> : <Lines lines={lines} names={names} onPick={setShown} />}
      <Window title={shown ? t.kinds[shown.kind] ?? shown.kind : ""} open={shown !== undefined} onClose={() => setShown(undefined)} wide>
        {shown && <Detail line={shown} name={names.get(shown.device) ?? ""} onClose={() => setShown(undefined)} />}
      </Window>
    </div>
  );
}

function Detail({ line, name, onClose }: { line: Line; name: string; onClose: () => void }) {
  const [whole, setWhole] = useState(false);
  const text = useMemo(() => JSON.stringify(line.event, undefined, 2), [line]);
  const cut = !whole && text.length > 20_000;
  return (
    <>
      <p>{time(line.at)} · <Link to="/devices/$id" params={{ id: line.device }}>{name || line.device}</Link> {line.href}</p>
      <pre tabIndex={0}>{cut ? text.slice(0, 20_000) : text}</pre>
      <p className="buttons">
        {cut && <Button onPress={() => setWhole(true)}>{t.whole(count(text.length))}</Button>}
        <Copy text={text} /> <Button onPress={onClose}>{texts.close}</Button>
      </p>
    </>
  );
}

/** Newest first. */
function Lines({ lines, names, onPick }: { lines: readonly Line[]; names: Map<string, string>; onPick: (l: Line) => void }) {
  const scroll = useRef<HTMLDivElement>(null);
  const virtual = useVirtualizer({
    count: lines.length, getScrollElement: () => scroll.current, estimateSize: () => 40, overscan: 10, getItemKey: (i) => lines[lines.length - 1 - i]!.n,
  });
  // Whoever has scrolled reads something: what comes on top does not push it away.
  const before = useRef(lines.length);
  const newest = lines.at(-1)?.n;
  useEffect(() => {
    const more = lines.length - before.current;
    before.current = lines.length;
    if (scroll.current && scroll.current.scrollTop > 20 && more > 0) scroll.current.scrollTop += more * 40;
  }, [newest, lines.length]);
  const items = virtual.getVirtualItems();
  const top = items[0]?.start ?? 0;
  const bottom = virtual.getTotalSize() - (items.at(-1)?.end ?? 0);
  return (
    <div className="scroll" ref={scroll} tabIndex={0} role="region" aria-label={t.title}>
      <table aria-rowcount={lines.length + 1}>
        <thead><tr><th>{t.when}</th><th>{t.kind}</th><th>{t.device}</th><th>{t.href}</th><th>{t.what}</th></tr></thead>
        <tbody>
          {top > 0 && <tr aria-hidden="true"><td colSpan={5} style={{ height: top, padding: 0 }} /></tr>}
          {items.map((i) => {
            const l = lines[lines.length - 1 - i.index]!;
            return (
              <tr key={l.n}>
                <td><Button className="quiet small" onPress={() => onPick(l)} aria-label={`${texts.details}: ${t.kinds[l.kind] ?? l.kind}, ${time(l.at)}`}>{new Date(l.at).toLocaleTimeString()}</Button></td>
                <td>{t.kinds[l.kind] ?? l.kind}</td>
                <td>{names.get(l.device) || l.device.slice(0, 80)}</td>
                <td><code>{l.href}</code></td>
                <td><code>{l.text}</code></td>
              </tr>
            );
          })}
          {bottom > 0 && <tr aria-hidden="true"><td colSpan={5} style={{ height: bottom, padding: 0 }} /></tr>}
        </tbody>
      </table>
    </div>
  );
}
