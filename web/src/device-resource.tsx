/** One resource: what the twin has of it, live, and what can be asked of the device with it. */
import { useQuery } from "@tanstack/react-query";
import { useMemo, useState } from "react";
import { Tab, TabList, TabPanel, Tabs } from "react-aria-components";
import { useApp } from "./api";
import { Interface, Progress, TimeToLive, useOrder } from "./device-order";
import type { DeviceStore, Link, Twin } from "./device-store";
import { readOnly, rebase, toSend, updateInterfaces } from "./form";
import { broken, Fields, type Draft } from "./fields";
import { bytes, time } from "./format";
import { Raw, jsonOf, parse, type RawDraft } from "./raw";
import { same } from "./diff";
import { texts } from "./texts";
import { Button, Confirm, Copy, Facts, Moment } from "./ui";
import { Value } from "./value";
import { fromBase64, isOpaque, line } from "./visible";

const t = texts.device.resource;

/** What somebody began to write of a resource; kept while others are looked at. */
export interface Begun {
  form?: Draft;
  /** What the form began with. */
  base?: unknown;
  raw?: RawDraft;
  create?: RawDraft;
}

const unbegun = ({ form: _, base: __, ...rest }: Begun): Begun => rest;

// OCF Core, Section 7.8.2.1: the bits of a link's policy.
const discoverable = 1;
const observable = 2;

export function ResourceView({ deviceId, store, href, link, twin, begun, onBegun }: {
  deviceId: string; store: DeviceStore; href: string; link: Link | undefined; twin: Twin | undefined; begun: Begun; onBegun: (change: (old: Begun) => Begun) => void;
}) {
  const { session, hub } = useApp();
  const types = link?.resourceTypes ?? twin?.types ?? [];
  const interfaces = link?.interfaces ?? [];
  // The decoded form does not say how the device sent it. That is asked for when a resource is looked at, and when it is edited.
  const sent = useQuery({
    queryKey: ["device", deviceId, "sent", href], enabled: twin !== undefined, staleTime: 10_000,
    queryFn: async () => {
      const { data } = await hub.api.GET("/api/v1/devices/{deviceId}/resources/{href}", {
        params: { path: { deviceId, href: href.replace(/^\//, "") } }, headers: { Accept: "application/protojson" }, parseAs: "json",
      });
      const content = (data as { data?: { content?: { contentType?: string; coapContentFormat?: number; data?: string } } } | undefined)?.data?.content;
      return { type: content?.contentType ?? "", format: content?.coapContentFormat ?? -1, bytes: fromBase64(content?.data ?? "") };
    },
  });
  const policy = link?.policy.bitFlags ?? 0;
  return (
    <section className="resource" aria-label={line(href, 200)}>
      <div className="row spread">
        <h2><bdi>{line(href, 200)}</bdi></h2>
        <span className="row">{link?.title && <bdi>{line(link.title, 100)}</bdi>}<Copy text={href} label={t.copy} /></span>
      </div>
      <p className="chips">
        {types.map((x) => <code key={x} className="chip">{line(x, 80)}</code>)}
        {interfaces.map((x) => <code key={x} className="chip soft">{line(x, 80)}</code>)}
        {link && (policy & observable) !== 0 && <span className="chip soft">{t.observable}</span>}
        {link && (policy & discoverable) !== 0 && <span className="chip soft">{t.discoverable}</span>}
        {!link && <span className="chip soft">{t.unpublished}</span>}
      </p>
      {twin ? (
        <>
          <Value key={href} value={twin.content} label={t.valueOf(line(href, 100))} />
          <Facts
            of={[
              [t.status, <span key="s" className={twin.status === "OK" ? "good" : "bad"}>{texts.device.status[twin.status] ?? twin.status}</span>],
              [t.changed, <span key="c"><Moment at={twin.at} /> <small>{time(twin.at)}</small></span>],
              [t.version, twin.version],
              [t.format, sent.data ? `${line(sent.data.type || "–", 100)}${sent.data.format >= 0 ? ` (${sent.data.format})` : ""}, ${bytes(sent.data.bytes.length)}` : "…"],
              [t.etag, twin.etag ? <code key="e">{line(twin.etag, 60)}</code> : "–"],
            ]}
          />
        </>
      ) : <p className="empty">{t.noValue}</p>}
      {session.may("write") && (
        <Acts
          key={href} deviceId={deviceId} store={store} href={href} twin={twin} types={types} interfaces={interfaces}
          sent={sent.data && /cbor/.test(sent.data.type) ? sent.data.bytes : undefined} begun={begun} onBegun={onBegun}
        />
      )}
    </section>
  );
}

function Acts({ deviceId, store, href, twin, types, interfaces, sent, begun, onBegun }: {
  deviceId: string; store: DeviceStore; href: string; twin: Twin | undefined; types: readonly string[]; interfaces: readonly string[]; sent: Uint8Array | undefined;
  begun: Begun; onBegun: (change: (old: Begun) => Begun) => void;
}) {
  const ordering = useOrder(deviceId, store);
  const [seconds, setSeconds] = useState(60);
  const updates = useMemo(() => updateInterfaces(interfaces), [interfaces]);
  const [updateBy, setUpdateBy] = useState("");
  const [readBy, setReadBy] = useState("");
  const [deleteBy, setDeleteBy] = useState("");
  const [all, setAll] = useState(false);
  const [deleting, setDeleting] = useState(false);
  const value = twin?.content;
  const fixed = readOnly(interfaces, types);
  const { base, draft: now, moved } = useMemo(() => (begun.form ? rebase(begun.base, begun.form.value, value) : { base: value, draft: value, moved: false }), [begun.form, begun.base, value]);
  const draft: Draft = { value: now, typed: begun.form?.typed ?? {} };
  const changed = broken(draft) || !same(now, base);
  const raw: RawDraft = begun.raw ?? { as: "json", text: value === undefined || isOpaque(value) ? "" : jsonOf(value) };
  const create: RawDraft = begun.create ?? { as: "json", text: '{\n  "rt": [],\n  "if": ["oic.if.a", "oic.if.baseline"],\n  "rep": {}\n}' };
  const rawParsed = useMemo(() => parse(raw), [raw.as, raw.text]);
  const createParsed = useMemo(() => parse(create), [create.as, create.text]);
  const give = (verb: "retrieve" | "update" | "create" | "delete", by: string, body?: unknown) => ordering.give({ verb, href, interface: by, seconds, body });
  return (
    <div className="acts">
      <Tabs>
        <TabList aria-label={texts.actions}>
          <Tab id="form">{t.edit}</Tab><Tab id="raw">{t.raw}</Tab><Tab id="retrieve">{t.retrieve}</Tab><Tab id="create">{t.create}</Tab><Tab id="delete">{t.delete}</Tab>
        </TabList>
        <TabPanel id="form">
          <form onSubmit={(e) => {
            e.preventDefault();
            const sentForm = begun.form;
            void give("update", updateBy, toSend(base, now, all)).then((done) => {
              // It follows the device again, unless somebody went on typing meanwhile.
              if (done) onBegun(({ form, base, ...rest }) => (form && form !== sentForm ? { ...rest, form, base } : rest));
            });
          }}>
            {fixed && <p><small>{t.readOnly}</small></p>}
            {twin === undefined ? <p className="loading">{t.noValue}</p> : (
              <Fields draft={draft} types={types} readOnly={fixed} onChange={(form) => onBegun((old) => ({ ...old, form, base }))} />
            )}
            {moved && <p className="row" role="status"><small>{t.moved}</small><Button className="small" onPress={() => onBegun(unbegun)}>{t.takeNew}</Button></p>}
            {!fixed && twin !== undefined && !isOpaque(value) && (
              <div className="row send">
                <Interface value={updateBy} onChange={setUpdateBy} of={updates} none={t.noInterface} />
                <TimeToLive value={seconds} onChange={setSeconds} />
                <label><input type="checkbox" checked={all} onChange={(e) => setAll(e.target.checked)} /> {t.sendAll}</label>
                {changed && <Button className="small" onPress={() => onBegun(unbegun)}>{t.discard}</Button>}
                <Button type="submit" isDisabled={ordering.busy || broken(draft)}>{t.send}</Button>
              </div>
            )}
          </form>
        </TabPanel>
        <TabPanel id="raw">
          <form onSubmit={(e) => { e.preventDefault(); if ("body" in rawParsed) void give("update", updateBy, rawParsed.body); }}>
            <Raw draft={raw} onChange={(r) => onBegun((old) => ({ ...old, raw: r }))} value={value} bytes={sent} />
            <div className="row send">
              <Interface value={updateBy} onChange={setUpdateBy} of={interfaces} none={t.noInterface} />
              <TimeToLive value={seconds} onChange={setSeconds} />
              {begun.raw && <Button className="small" onPress={() => onBegun(({ raw: _, ...rest }) => rest)}>{t.discard}</Button>}
              <Button type="submit" isDisabled={ordering.busy || !("body" in rawParsed)}>{t.send}</Button>
            </div>
          </form>
        </TabPanel>
        <TabPanel id="retrieve">
          <p>{t.retrieveMore}</p>
          <div className="row send">
            <Interface value={readBy} onChange={setReadBy} of={interfaces} none={t.noInterface} />
            <TimeToLive value={seconds} onChange={setSeconds} />
            <Button className="primary" isDisabled={ordering.busy} onPress={() => void give("retrieve", readBy)}>{t.retrieve}</Button>
          </div>
        </TabPanel>
        <TabPanel id="create">
          <form onSubmit={(e) => { e.preventDefault(); if ("body" in createParsed) void give("create", "", createParsed.body); }}>
            <p>{t.createMore}</p>
            <Raw draft={create} onChange={(c) => onBegun((old) => ({ ...old, create: c }))} value={undefined} bytes={undefined} />
            <div className="row send">
              <TimeToLive value={seconds} onChange={setSeconds} />
              <Button type="submit" isDisabled={ordering.busy || !("body" in createParsed)}>{t.create}</Button>
            </div>
          </form>
        </TabPanel>
        <TabPanel id="delete">
          <p>{t.deleteMore}</p>
          <div className="row send">
            <Interface value={deleteBy} onChange={setDeleteBy} of={interfaces} none={t.noInterface} />
            <TimeToLive value={seconds} onChange={setSeconds} />
            <Button className="danger" isDisabled={ordering.busy} onPress={() => setDeleting(true)}>{t.delete}</Button>
          </div>
        </TabPanel>
      </Tabs>
      <Progress deviceId={deviceId} of={ordering} />
      <Confirm
        title={t.delete} text={t.confirmDelete(confirmWord(href))} word={confirmWord(href)} action={t.delete} open={deleting} onClose={() => setDeleting(false)}
        run={async () => { void give("delete", deleteBy); }}
      />
    </div>
  );
}

/** A word that can be typed: of an href that has more than that, its length. */
function confirmWord(href: string): string {
  return href.length <= 64 && /^[\x21-\x7e]+$/.test(href) ? href : String(href.length);
}
