/** How the hub itself is: its parts, its rates and latencies, its configuration, and where more is written. */
import { useNavigate, useSearch } from "@tanstack/react-router";
import { useQuery } from "@tanstack/react-query";
import { useEffect, useMemo, useRef, useState } from "react";
import { Tab, TabList, TabPanel, Tabs } from "react-aria-components";
import { useApp } from "./api";
import { Chart } from "./chart";
import { count } from "./format";
import { parse, quantile, rate, sum, type Picture } from "./metrics";
import { texts } from "./texts";
import { Copy, Facts, Failure, Loading, Moment, save, Button } from "./ui";

const t = texts.system;

export function SystemPage() {
  const { session } = useApp();
  const { tab } = useSearch({ from: "/system" });
  const navigate = useNavigate();
  const admin = session.may("admin");
  return (
    <>
      <h1>{t.title}</h1>
      <Tabs selectedKey={tab ?? (admin ? "overview" : "links")} onSelectionChange={(k) => void navigate({ to: "/system", search: { tab: String(k) }, replace: true })}>
        <TabList aria-label={t.title}>
          {admin && <Tab id="overview">{t.overview}</Tab>}
          {admin && <Tab id="rates">{t.rates}</Tab>}
          {admin && <Tab id="configuration">{t.configuration}</Tab>}
          <Tab id="links">{t.links}</Tab>
        </TabList>
        {admin && <TabPanel id="overview"><Overview /></TabPanel>}
        {admin && <TabPanel id="rates"><Rates /></TabPanel>}
        {admin && <TabPanel id="configuration"><Configuration /></TabPanel>}
        <TabPanel id="links"><Links /></TabPanel>
      </Tabs>
    </>
  );
}

function Overview() {
  const { hub } = useApp();
  const system = useQuery({ queryKey: ["system"], refetchInterval: 5_000, queryFn: async () => (await hub.api.GET("/api/v1/system")).data! });
  const parts = useQuery({ queryKey: ["parts"], refetchInterval: 5_000, queryFn: async () => (await hub.api.GET("/api/v1/system/parts")).data! });
  const s = system.data;
  if (!s) return system.error ? <Failure error={system.error} retry={() => void system.refetch()} /> : <Loading />;
  return (
    <>
      {s.readOnly && <p className="failure" role="alert">{s.readOnly}</p>}
      {s.notReady && <div className="failure" role="alert">{t.notReady} <Facts of={Object.entries(s.notReady)} /></div>}
      <section className="card" aria-label={t.overview}>
        <Facts
          of={[
            [t.version, `${s.version}${s.build.commit ? ` (${s.build.commit.slice(0, 12)})` : ""}`], [t.started, <Moment key="s" at={Date.parse(s.started)} />], [t.devices, count(s.devices)], [t.online, count(s.online)],
            [t.hubId, <code key="h">{s.hubId}</code>], ...(s.issuer ? [[t.issuer, <code key="i">{s.issuer}</code>] as const] : []),
            ...Object.entries(s.endpoints).map(([name, uri]) => [name, <code key="e">{uri}</code>] as const),
          ]}
        />
      </section>
      <section aria-label={t.parts}>
        <h2>{t.parts}</h2>
        <Failure error={parts.error} />
        <div className="scroll" tabIndex={0} role="region" aria-label={t.parts}>
          <table>
            <thead><tr><th>{t.part}</th><th>{t.process}</th><th>{t.version}</th><th>{t.state}</th><th>{t.since}</th><th>{t.partitions}</th><th>{t.sessions}</th><th>{t.behind}</th></tr></thead>
            <tbody>
              {parts.data?.map((p) => (
                <tr key={p.target + p.instance}>
                  <td>{p.target}</td><td>{p.name}</td><td>{p.version}</td><td className={p.state === "serves" ? "good" : ""}>{t.states[p.state] ?? p.state}</td><td><Moment at={Date.parse(p.started)} /></td>
                  <td>{p.partitions ?? ""}</td><td>{p.sessions ?? ""}</td><td>{p.behind ?? ""}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      </section>
    </>
  );
}

const every = 2_000;
const most = 300; // ten minutes

function Rates() {
  const { hub } = useApp();
  const [pictures, setPictures] = useState<Picture[]>([]);
  const metrics = useQuery({
    queryKey: ["metrics"], refetchInterval: every, staleTime: 0, gcTime: 0,
    queryFn: async () => parse((await hub.api.GET("/api/v1/system/metrics", { parseAs: "text" })).data as string, Date.now()),
  });
  useEffect(() => {
    if (metrics.data) setPictures((old) => [...old, metrics.data].slice(-most - 1));
  }, [metrics.data]);
  const at = useMemo(() => pictures.slice(1).map((p) => p.at), [pictures]);
  const charts = useMemo(() => {
    const over = (label: string, f: (a: Picture, b: Picture) => number | undefined): Series => ({ label, values: pictures.slice(1).map((b, i) => f(pictures[i]!, b) ?? null) });
    const ms = (v: number | undefined) => (v === undefined ? undefined : 1000 * v);
    return [
      { title: t.charts.devices, unit: "", series: [over(t.charts.sessions, (_, b) => sum(b, "coaphub_coap_gateway_sessions")), over(t.charts.connections, (_, b) => sum(b, "coaphub_coap_connections"))] },
      { title: t.charts.events, unit: "/s", series: [over(t.charts.changes, (a, b) => rate(a, b, "coaphub_coap_gateway_changes_total")), over(t.charts.stored, (a, b) => rate(a, b, "coaphub_directory_events_total"))] },
      { title: t.charts.requests, unit: "/s", series: [over(t.charts.api, (a, b) => rate(a, b, "coaphub_api_requests_total")), over(t.charts.messages, (a, b) => rate(a, b, "coaphub_api_subscription_messages_total"))] },
      { title: t.charts.latency, unit: " ms", series: [
        over(t.charts.append, (a, b) => ms(quantile(a, b, "coaphub_directory_append_seconds", 0.5))), over(t.charts.append99, (a, b) => ms(quantile(a, b, "coaphub_directory_append_seconds", 0.99))),
        over(t.charts.command, (a, b) => ms(quantile(a, b, "coaphub_coap_gateway_command_seconds", 0.5))), over(t.charts.apiLatency, (a, b) => ms(quantile(a, b, "coaphub_api_request_seconds", 0.5))),
      ] },
      { title: t.charts.process, unit: "", series: [over(t.charts.cpu, (a, b) => { const r = rate(a, b, "process_cpu_seconds_total"); return r === undefined ? undefined : 100 * r; })] },
      { title: t.charts.memory, unit: " MB", series: [over(t.charts.resident, (_, b) => { const m = sum(b, "process_resident_memory_bytes"); return m === undefined ? undefined : m / 1e6; })] },
    ];
  }, [pictures]);
  return (
    <>
      <p>{t.ratesHint}</p>
      <Failure error={metrics.error} />
      {at.length === 0 ? <Loading what={t.collecting} /> : <div className="charts">{charts.map((c) => <Rate key={c.title} title={c.title} at={at} unit={c.unit} series={c.series} />)}</div>}
    </>
  );
}

interface Series {
  label: string;
  values: (number | null)[];
}

/** A few numbers over time, with what each is now. */
function Rate({ title, at, series, unit }: { title: string; at: number[]; series: Series[]; unit: string }) {
  const legend = useRef<HTMLUListElement>(null);
  const now = series.map((s) => [s.label, `${short(s.values.findLast((v) => v !== null) ?? 0)}${unit}`] as const);
  return (
    <figure className="rate">
      <figcaption>{title}</figcaption>
      <ul className="legend" ref={legend}>{now.map(([label, value], i) => <li key={label} className={`series-${i}`}><span>{label} <b>{value}</b></span></li>)}</ul>
      <Chart
          label={`${title}: ${now.map((n) => n.join(" ")).join(", ")}`} lines={series.map((s, i) => ({ label: s.label, steps: false, colour: () => legend.current?.children[i] as HTMLElement | undefined }))}
          data={[at.map((ms) => ms / 1000), ...series.map((s) => s.values)]} range={{ min: at[0]! / 1000, max: Math.max(at.at(-1)! / 1000, at[0]! / 1000 + 10) }} onRange={() => undefined}
      />
    </figure>
  );
}

/** Three significant digits. */
export function short(n: number): string {
  const a = Math.abs(n);
  if (a >= 1e9) return `${+(n / 1e9).toPrecision(3)} G`;
  if (a >= 1e6) return `${+(n / 1e6).toPrecision(3)} M`;
  if (a >= 1e4) return `${+(n / 1e3).toPrecision(3)} k`;
  return String(+n.toPrecision(3));
}

function Configuration() {
  const { hub } = useApp();
  const c = useQuery({ queryKey: ["configuration"], queryFn: async () => (await hub.api.GET("/api/v1/system/configuration")).data! });
  if (!c.data) return c.error ? <Failure error={c.error} retry={() => void c.refetch()} /> : <Loading />;
  return (
    <>
      <h2>{t.differs}</h2>
      <pre tabIndex={0}>{c.data.differs}</pre>
      <div className="row spread">
        <h2>{t.whole}</h2>
        <span className="row"><Copy text={c.data.configuration} /><Button className="small" onPress={() => save("coaphub.yaml", c.data.configuration)}>{texts.download}</Button></span>
      </div>
      <pre tabIndex={0}>{c.data.configuration}</pre>
    </>
  );
}

function Links() {
  return (
    <ul>
      <li><a href="/api/v1/docs" target="_blank" rel="noreferrer">{t.reference}</a></li>
      <li><a href="/api/v1/openapi.json" target="_blank" rel="noreferrer">{t.openapi}</a></li>
      <li><a href="/console/errors.html" target="_blank" rel="noreferrer">{t.errors}</a></li>
      <li><a href="/.well-known/configuration" target="_blank" rel="noreferrer">{t.wellKnown}</a></li>
      <li><a href="https://github.com/coaphub/coaphub/tree/main/docs" target="_blank" rel="noreferrer">{t.documentation}</a></li>
    </ul>
  );
}
