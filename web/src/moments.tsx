/** What a device had at one moment, and at another: the hub reads its history for both. */
import { useState } from "react";
import { all, useApp } from "./api";
import { Difference } from "./difference";
import { texts } from "./texts";
import { Button, Choice, Failure } from "./ui";
import { line } from "./visible";

const t = texts.device.moments;
const hour = 3_600_000;

export function Moments({ deviceId, hrefs, href }: { deviceId: string; hrefs: readonly string[]; href: string }) {
  const { hub } = useApp();
  const [of, setOf] = useState<string>();
  const [from, setFrom] = useState(() => local(Date.now() - hour));
  const [to, setTo] = useState(() => local(Date.now()));
  const [read, setRead] = useState<{ before: unknown; after: unknown }>();
  const [error, setError] = useState<unknown>();
  const [busy, setBusy] = useState(false);
  const chosen = of ?? href;
  const at = async (when: string): Promise<unknown> => {
    const moment = new Date(when).toISOString();
    const twins = await all(hub, "/api/v1/devices/{deviceId}/resources", { at: moment }, { deviceId });
    const values = twins.filter((r) => r.data && (chosen === "" || r.data.resourceId.href === chosen)).map((r) => [r.data!.resourceId.href, r.data!.content] as const);
    return chosen === "" ? Object.fromEntries(values) : values[0]?.[1];
  };
  const run = () => {
    setBusy(true);
    setError(undefined);
    Promise.all([at(from), at(to)]).then(([before, after]) => setRead({ before, after }), (e: unknown) => { setError(e); setRead(undefined); }).finally(() => setBusy(false));
  };
  return (
    <section className="card" aria-labelledby="moments">
      <h2 id="moments">{t.title}</h2>
      <form className="row" onSubmit={(e) => { e.preventDefault(); if (!busy) run(); }}>
        <Choice label={t.of} value={chosen} onChange={setOf} options={[["", t.everything], ...hrefs.map((h) => [h, line(h, 60)] as const)]} />
        <label className="choice">{t.from} <input type="datetime-local" step={1} required value={from} onChange={(e) => setFrom(e.target.value)} /></label>
        <label className="choice">{t.to} <input type="datetime-local" step={1} required value={to} onChange={(e) => setTo(e.target.value)} /></label>
        <Button type="submit" isDisabled={busy}>{t.compare}</Button>
      </form>
      <Failure error={error} />
      {read && <Difference before={read.before} after={read.after} />}
      {read && read.before === undefined && read.after === undefined && <p className="loading">{texts.none}</p>}
    </section>
  );
}

/** A moment as a field for times has it, in the time of this place. */
function local(ms: number): string {
  const d = new Date(ms - 60_000 * new Date(ms).getTimezoneOffset());
  return d.toISOString().slice(0, 19);
}
