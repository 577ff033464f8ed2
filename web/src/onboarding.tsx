/** "Add device": what a device needs to come, as text, as a QR code and as command lines; then the device arriving, or why it does not. */
import { Link } from "@tanstack/react-router";
import { encode } from "cborg";
import qrcode from "qrcode-generator";
import { useEffect, useMemo, useState } from "react";
import { Tab, TabList, TabPanel, Tabs } from "react-aria-components";
import { useApp, type components } from "./api";
import { toHex } from "./cbor";
import { texts } from "./texts";
import { Button, Choice, Copy, Facts, Failure, Field, Reason, save } from "./ui";

const t = texts.add;

type Onboarding = components["schemas"]["Onboarding"];
type Refusal = components["schemas"]["Refusal"];
type Proof = "certificate" | "key" | "code";

export function OnboardingPage() {
  const { hub, session } = useApp();
  const [id, setID] = useState(() => crypto.randomUUID() as string);
  const [proof, setProof] = useState<Proof>("certificate");
  const [made, setMade] = useState<{ o: Onboarding; since: number } | undefined>();
  const [error, setError] = useState<unknown>();
  const [busy, setBusy] = useState(false);
  if (!session.may("write")) return <p>{texts.notAllowed}</p>;
  const make = () => {
    setBusy(true);
    setError(undefined);
    const since = Date.now();
    hub.api
      .POST("/api/v1/onboarding", { body: { deviceId: id.trim().toLowerCase(), certificate: proof === "certificate", preSharedKey: proof === "key" } })
      .then(({ data }) => data && setMade({ o: data, since }), setError)
      .finally(() => setBusy(false));
  };
  return (
    <div className="narrow">
      <h1>{t.title}</h1>
      <form className="card" onSubmit={(e) => { e.preventDefault(); if (!busy) make(); }}>
        <p>{t.intro}</p>
        <div className="row">
          <Field label={t.id} value={id} onChange={setID} required hint={t.idHint} />
          <Button className="small" onPress={() => setID(crypto.randomUUID())}>{t.another}</Button>
        </div>
        <Choice label={t.proof} value={proof} onChange={setProof} options={[["certificate", t.certificate], ["key", t.key], ["code", t.codeOnly]]} />
        <p><small>{t.proofHint[proof]}</small></p>
        <Failure error={error} />
        <p className="buttons"><Button type="submit" isDisabled={busy}>{t.make}</Button></p>
      </form>
      {made && <Made key={made.since} o={made.o} since={made.since} again={make} />}
    </div>
  );
}

function Made({ o, since, again }: { o: Onboarding; since: number; again: () => void }) {
  return (
    <>
      <Arrival id={o.deviceId ?? ""} since={since} expires={o.expiresAt ? Date.parse(o.expiresAt) : 0} again={again} />
      <section className="card" aria-label={t.needs}>
        <h2>{t.needs}</h2>
        <p>{t.once}</p>
        <div className="split">
          <Facts
            of={[
              ...Object.entries(o.endpoints).filter(([scheme]) => scheme.startsWith("coap")).map(([scheme, uri]) => [scheme, <code key="c">{uri}</code>] as const),
              [t.hubId, <code key="h">{o.hubId}</code>], [t.deviceId, <code key="d">{o.deviceId}</code>], [t.provider, <code key="p">{o.authorizationProvider}</code>],
              ...(o.authorizationCode ? [[t.code, <span key="c" className="row"><code>{o.authorizationCode}</code> <Copy text={o.authorizationCode} /></span>] as const] : []),
              ...(o.authorizeUrl ? [[t.authorize, <a key="a" href={o.authorizeUrl} target="_blank" rel="noreferrer">{o.authorizeUrl}</a>] as const] : []),
              ...(o.psk ? ([[t.pskIdentity, <code key="i">{o.pskIdentity}</code>], [t.psk, <span key="k" className="row"><code>{o.psk}</code> <Copy text={o.psk} /></span>]] as const) : []),
            ]}
          />
          <QR text={qrText(o)} />
        </div>
        <p className="row">
          <Button onPress={() => save("ca.pem", o.ca)}>{texts.download} ca.pem</Button>
          {o.identity && <Button onPress={() => save("cert.pem", o.identity!.chain)}>{texts.download} cert.pem</Button>}
          {o.identity && <Button onPress={() => save("key.pem", o.identity!.key)}>{texts.download} key.pem</Button>}
          <Copy text={o.ca} label={t.copyCA} />
        </p>
      </section>
      <section className="card" aria-label={t.commands}>
        <h2>{t.commands}</h2>
        <Tabs>
          <TabList aria-label={t.commands}>{recipes(o).map((r) => <Tab key={r.name} id={r.name}>{r.name}</Tab>)}</TabList>
          {recipes(o).map((r) => (
            <TabPanel key={r.name} id={r.name}>
              <p>{r.text}</p>
              <pre tabIndex={0}>{r.command}</pre>
              <Copy text={r.command} />
            </TabPanel>
          ))}
        </Tabs>
      </section>
    </>
  );
}

/** The device as it comes: registered, online, named; or why it was turned away. */
function Arrival({ id, since, expires, again }: { id: string; since: number; expires: number; again: () => void }) {
  const { hub, live } = useApp();
  const [step, setStep] = useState<"waiting" | "registered" | "online" | "published">("waiting");
  const [refusals, setRefusals] = useState<Refusal[]>([]);
  const [late, setLate] = useState(false);
  useEffect(
    () =>
      live.subscribe({ eventFilter: ["REGISTERED"], includeCurrentState: true }, {
        told: (e) => e.deviceRegistered?.deviceIds.includes(id) && setStep((s) => (s === "waiting" ? "registered" : s)),
      }),
    [live, id],
  );
  useEffect(
    () =>
      live.subscribe({ eventFilter: ["DEVICE_METADATA_UPDATED", "RESOURCE_PUBLISHED"], deviceIdFilter: [id], includeCurrentState: true }, {
        told: (e) => {
          if (e.deviceMetadataUpdated?.connection.status === "ONLINE") setStep((s) => (s === "published" ? s : "online"));
          if (e.resourcePublished?.resources?.length) setStep("published");
        },
      }),
    [live, id],
  );
  useEffect(() => {
    if (step === "online" || step === "published") return;
    let over = false;
    let timer: ReturnType<typeof setTimeout>;
    const look = async () => {
      try {
        const { elements } = await hub.page("/api/v1/refusals", { query: { limit: 100 } });
        // One that never said who he is may be this device, where administrators see such.
        if (!over) setRefusals(elements.filter((r) => Date.parse(r.time) >= since && (r.device === id || !r.device)).slice(0, 5));
      } catch {
        // the next look may do better, and the banner says what is wrong
      }
      setLate(expires > 0 && Date.now() > expires);
      if (!over) timer = setTimeout(() => void look(), 2000);
    };
    void look();
    return () => {
      over = true;
      clearTimeout(timer);
    };
  }, [hub, id, since, expires, step]);
  const there = step === "online" || step === "published";
  return (
    <section className={`card arrival ${step}`} aria-label={t.arrival}>
      <div role="status">
        <h2>{t.steps[step]}</h2>
        {there && <p><Link to="/devices/$id" params={{ id }} className="button primary">{t.look}</Link></p>}
        {!there && <p>{late ? t.late : t.waiting}</p>}
      </div>
      {!there && late && <Button onPress={again}>{t.make}</Button>}
      {!there && refusals.length > 0 && (
        <div role="alert">
          <h3>{t.refused}</h3>
          <ul>
            {refusals.map((r) => (
              <li key={r.time + r.remote}>{r.what}{!r.device && ` (${t.nobody})`}: <Reason of={r.reason} /> <small>{r.remote}</small></li>
            ))}
          </ul>
        </div>
      )}
    </section>
  );
}

/** What the QR code says: JSON that an application which brings devices into a hub can read. */
export function qrText(o: Onboarding): string {
  return JSON.stringify({
    hubId: o.hubId, deviceId: o.deviceId, endpoint: o.endpoints["coaps+tcp"] ?? o.endpoints.coaps ?? o.endpoints["coap+tcp"] ?? o.endpoints.coap,
    authorizationProvider: o.authorizationProvider, authorizationCode: o.authorizationCode, pskIdentity: o.pskIdentity, psk: o.psk,
  });
}

function QR({ text }: { text: string }) {
  const { path, size } = useMemo(() => {
    const qr = qrcode(0, "M");
    qr.addData(text);
    qr.make();
    const n = qr.getModuleCount();
    let d = "";
    for (let y = 0; y < n; y++) for (let x = 0; x < n; x++) if (qr.isDark(y, x)) d += `M${x + 4} ${y + 4}h1v1h-1z`;
    return { path: d, size: n + 8 }; // ISO/IEC 18004: four modules of quiet zone
  }, [text]);
  return <svg className="qr" viewBox={`0 0 ${size} ${size}`} role="img" aria-label={t.qr} shapeRendering="crispEdges"><rect width={size} height={size} fill="#fff" /><path d={path} fill="#000" /></svg>;
}

/** One word of a POSIX shell. */
export function quote(s: string): string {
  return /^[\w\-./:@%+=,]+$/.test(s) ? s : `'${s.replaceAll("'", `'\\''`)}'`;
}

/** Command lines that work as they stand where the files that this page hands out are in the folder. */
export function recipes(o: Onboarding): { name: string; text: string; command: string }[] {
  const tcp = o.endpoints["coaps+tcp"];
  const dtls = o.endpoints.coaps;
  const code = o.authorizationCode;
  const out: { name: string; text: string; command: string }[] = [];
  if (code && o.psk && dtls)
    out.push({ name: t.simulator, text: t.simulatorKey, command: `coaphub simulate --device-id ${o.deviceId} --key ${quote(o.psk)} --code ${quote(code)} --server ${quote(dtls)}` });
  if (code && o.identity && tcp)
    out.push({ name: t.simulator, text: t.simulatorText, command: `coaphub simulate --device-id ${o.deviceId} --cert . --code ${quote(code)} --server ${quote(tcp)}` });
  if (o.psk && dtls)
    out.push({ name: t.libcoap, text: t.libcoapKey, command: `coap-client-openssl -m get -u ${o.pskIdentity} -k ${quote(o.psk)} ${quote(`${dtls}/x.plgd.dev/time`)}` });
  if (o.identity && tcp) {
    const files = "-c cert.pem -j key.pem -R ca.pem";
    let command = `coap-client-openssl -m get ${files} ${quote(`${tcp}/x.plgd.dev/time`)}`;
    if (code) {
      const body = hex({ di: o.deviceId ?? "", accesstoken: code, authprovider: o.authorizationProvider });
      command += `\necho ${body} | xxd -r -p > signup.cbor\ncoap-client-openssl -m post -t 60 -A 50 ${files} -f signup.cbor ${quote(`${tcp}/oic/sec/account`)}`;
    }
    out.push({ name: t.libcoap, text: t.libcoapText, command });
  }
  if (code && tcp) out.push({ name: t.iotivity, text: t.iotivityText, command: `cloud_server lamp ${quote(code)} ${quote(tcp)} ${o.hubId} ${quote(o.authorizationProvider)}` });
  return out;
}

/** The body of a sign-up: CBOR (RFC 8949), as hexadecimal digits. */
export function hex(body: Record<string, string>): string {
  return toHex(encode(body)).replaceAll(" ", "");
}
