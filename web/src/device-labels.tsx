/** What the owner wrote on a device. */
import { useQueryClient } from "@tanstack/react-query";
import { useState } from "react";
import { useApp, type Device } from "./api";
import { texts } from "./texts";
import { Button, Failure, Field, Window } from "./ui";
import { line } from "./visible";

const t = texts.device.labels;

export function Labels({ id, labels }: { id: string; labels: Readonly<Record<string, string>> }) {
  const { session } = useApp();
  const [open, setOpen] = useState(false);
  const all = Object.entries(labels);
  return (
    <>
      {all.map(([k, v]) => <span key={k} className="chip label"><b>{line(k, 63)}</b> <bdi>{line(v, 100)}</bdi></span>)}
      {session.may("write") && <Button className="small" onPress={() => setOpen(true)}>{all.length > 0 ? t.edit : t.add}</Button>}
      {open && <Editor id={id} labels={labels} onClose={() => setOpen(false)} />}
    </>
  );
}

function Editor({ id, labels, onClose }: { id: string; labels: Readonly<Record<string, string>>; onClose: () => void }) {
  const { hub } = useApp();
  const queries = useQueryClient();
  const [rows, setRows] = useState<[string, string][]>(() => [...Object.entries(labels), ["", ""]]);
  const [error, setError] = useState<unknown>();
  const [busy, setBusy] = useState(false);
  const set = (i: number, row: [string, string]) => setRows((old) => {
    const next = old.map((r, j) => (i === j ? row : r));
    return next.at(-1)![0] ? [...next, ["", ""]] : next;
  });
  const save = () => {
    setBusy(true);
    setError(undefined);
    // Only what changed: labels that somebody else wrote meanwhile stay.
    const wanted = new Map(rows.filter(([k]) => k));
    const change: Record<string, string | null> = {};
    for (const k of Object.keys(labels)) if (!wanted.has(k)) change[k] = null;
    for (const [k, v] of wanted) if (!Object.hasOwn(labels, k) || labels[k] !== v) change[k] = v;
    hub.api.PATCH("/api/v1/devices/{deviceId}/labels", { params: { path: { deviceId: id } }, body: { labels: change } }).then(({ data }) => {
      queries.setQueryData<Device>(["device", id], (old) => (old ? { ...old, labels: data?.labels ?? {} } : old));
      onClose();
    }, setError).finally(() => setBusy(false));
  };
  return (
    <Window title={t.title} open onClose={onClose}>
      <form onSubmit={(e) => { e.preventDefault(); if (!busy) save(); }}>
        <p><small>{t.more}</small></p>
        {rows.map(([k, v], i) => (
          <div className="pair" key={i}>
            <Field label={t.name} value={k} onChange={(name) => set(i, [name, v])} autoFocus={i === 0} />
            <Field label={t.value} value={v} onChange={(value) => set(i, [k, value])} />
            <Button className="small" aria-label={t.remove(k)} onPress={() => setRows((old) => (old.length > 1 ? old.filter((_, j) => j !== i) : [["", ""]]))}>✕</Button>
          </div>
        ))}
        <Failure error={error} />
        <p className="buttons"><Button onPress={onClose}>{texts.cancel}</Button><Button type="submit" isDisabled={busy}>{texts.save}</Button></p>
      </form>
    </Window>
  );
}
