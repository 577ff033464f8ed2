/** Asking a device for something: how long, with which interface, and how it goes until the device answered. */
import { useEffect, useRef, useState, useSyncExternalStore, type ReactNode } from "react";
import { useApp } from "./api";
import { cancel, ofDevice, order, type Answer, type Order } from "./command";
import type { Command, DeviceStore } from "./device-store";
import { texts } from "./texts";
import { Button, Choice, Failure } from "./ui";
import { Value } from "./value";
import { isOpaque } from "./visible";

const t = texts.device.order;

/** How a device says that it did it; what is stored may end otherwise. */
const fine = new Set(["OK", "CREATED", "ACCEPTED", "NOT_MODIFIED"]);

interface Going {
  order: Order;
  since: number;
  /** Commands that were there before: the new one is another. */
  before: ReadonlySet<string>;
  answer?: Answer;
  error?: unknown;
}

/** What is under way of one place of the page. */
export function useOrder(deviceId: string, store: DeviceStore) {
  const app = useApp();
  const [going, setGoing] = useState<Going>();
  const here = useRef(true);
  useEffect(() => {
    here.current = true;
    return () => {
      here.current = false;
    };
  }, []);
  const give = async (o: Omit<Order, "key">): Promise<boolean> => {
    const { waiting, ended } = store.get();
    const begun: Going = { order: { ...o, key: crypto.randomUUID() }, since: Date.now(), before: new Set([...waiting, ...ended].map((c) => c.id)) };
    setGoing(begun);
    try {
      const answer = await order(app, deviceId, begun.order);
      if (here.current) setGoing({ ...begun, answer });
      return true;
    } catch (error) {
      if (here.current) setGoing({ ...begun, error });
      return false;
    }
  };
  const picture = useSyncExternalStore(store.listen, store.get);
  const mine = (c: { id: string; verb: string; href: string }) => going !== undefined && c.verb === going.order.verb && c.href === going.order.href && !going.before.has(c.id);
  const waits = picture.waiting.find(mine);
  let answer = going?.answer;
  if (answer?.status === "") {
    const ended = picture.ended.find(mine); // it was stored, and its end is an event
    if (ended) answer = { status: ended.status, content: ended.content };
  }
  const busy = going !== undefined && going.answer === undefined && going.error === undefined;
  return { give, going, busy, waits, answer, forget: () => setGoing(undefined) };
}

export type Ordering = ReturnType<typeof useOrder>;

/** How it goes: waiting, with a way to take it back; the answer; or the refusal with the device's own words. */
export function Progress({ deviceId, of }: { deviceId: string; of: Ordering }) {
  const { going, busy, waits, answer, forget } = of;
  if (!going) return null;
  const said = going.error === undefined ? undefined : ofDevice(going.error);
  const stored = answer?.status === "";
  return (
    <div className="progress" role="status">
      {(busy || stored) && (
        <p className="row">
          <span className="spinner" aria-hidden="true" />
          <Waiting verb={t.doing[going.order.verb]} stored={stored} since={going.since} />
          {waits && <Cancel deviceId={deviceId} command={waits} />}
        </p>
      )}
      {answer && !stored && <Outcome title={answer.status === "CANCELED" ? t.ended : t.answered} answer={answer} onClose={forget} good={fine.has(answer.status)} />}
      {going.error !== undefined && (
        <>
          <Failure error={going.error} />
          {said ? <Outcome title={t.deviceSaid} answer={said} onClose={forget} /> : <Button className="small" onPress={forget}>{texts.close}</Button>}
        </>
      )}
    </div>
  );
}

function Waiting({ verb, stored, since }: { verb: string; stored: boolean; since: number }) {
  const [now, setNow] = useState(Date.now);
  useEffect(() => {
    const timer = setInterval(() => setNow(Date.now()), 1000);
    return () => clearInterval(timer);
  }, []);
  return <span>{stored ? t.stored : verb} <small aria-hidden="true">{t.seconds(Math.max(0, Math.round((now - since) / 1000)))}</small></span>;
}

function Outcome({ title, answer, onClose, good }: { title: string; answer: Answer; onClose: () => void; good?: boolean }) {
  const empty = answer.content === undefined || answer.content === null || (isOpaque(answer.content) && !answer.content.data);
  return (
    <div className="outcome">
      <p className="row spread">
        <span>{title} <strong className={good ? "good" : "bad"}>{texts.device.status[answer.status] ?? answer.status}</strong></span>
        <Button className="small" onPress={onClose}>{texts.close}</Button>
      </p>
      {!empty && <Value value={answer.content} label={title} />}
    </div>
  );
}

export function Cancel({ deviceId, command }: { deviceId: string; command: Command }) {
  const app = useApp();
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<unknown>();
  const run = () => {
    setBusy(true);
    setError(undefined);
    cancel(app, deviceId, command).catch(setError).finally(() => setBusy(false));
  };
  return <><Button className="small" isDisabled={busy} onPress={run}>{t.cancel}</Button><Failure error={error} /></>;
}

const spans = [10, 60, 600, 3600, 86_400, 604_800] as const;

/** For how long the device may take. */
export function TimeToLive({ value, onChange }: { value: number; onChange: (seconds: number) => void }) {
  return <Choice label={t.timeToLive} value={String(value)} onChange={(v) => onChange(Number(v))} options={spans.map((s) => [String(s), t.span[s]] as const)} />;
}

export function Interface({ value, onChange, of, none }: { value: string; onChange: (v: string) => void; of: readonly string[]; none: string }): ReactNode {
  return <Choice label={t.interface} value={value} onChange={onChange} options={[["", none], ...of.map((i) => [i, i] as const)]} />;
}
