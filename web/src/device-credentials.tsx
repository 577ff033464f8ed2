/** By what a device proves who it is: certificates, and its pre-shared key. */
import { useQuery, useQueryClient } from "@tanstack/react-query";
import { useState } from "react";
import { all, HubError, millis, reasons, records, useApp, type components } from "./api";
import { time } from "./format";
import { texts } from "./texts";
import { Button, Choice, Copy, Facts, Failure, Loading, save, Window } from "./ui";
import { line } from "./visible";

const t = texts.device.credentials;
type Certificate = components["schemas"]["SigningRecord"];

export function Certificates({ id }: { id: string }) {
  const { hub, session } = useApp();
  const queries = useQueryClient();
  const key = ["device", id, "certificates"];
  const { data, error, isPending, refetch } = useQuery({ queryKey: key, queryFn: () => all(hub, records, { deviceIdFilter: [id] }) });
  const [revoking, setRevoking] = useState<string>();
  const sorted = [...(data ?? [])].sort((a, b) => (BigInt(b.creationDate) > BigInt(a.creationDate) ? 1 : -1));
  return (
    <section className="card" aria-labelledby="certificates">
      <h2 id="certificates">{t.certificates}</h2>
      <Failure error={error} retry={() => void refetch()} />
      {isPending && <Loading />}
      {data?.length === 0 && <p className="loading">{t.noCertificate}</p>}
      {sorted.length > 0 && (
        <div className="scroll" tabIndex={0} role="group" aria-label={t.certificates}>
          <table>
            <thead><tr><th>{t.serial}</th><th>{t.state}</th><th>{t.issued}</th><th>{t.until}</th><th>{t.by}</th><th><span className="hidden">{texts.actions}</span></th></tr></thead>
            <tbody>
              {sorted.map((c) => (
                <tr key={c.id}>
                  <td><code>{line(c.id, 40)}</code></td>
                  <td><State of={c} /></td>
                  <td>{time(millis(c.creationDate))}</td>
                  <td>{time(millis(c.credential.validUntilDate))}</td>
                  <td>{t.method[c.requestMethod] ?? c.requestMethod}{c.requestedBy ? `, ${line(c.requestedBy, 60)}` : ""}</td>
                  <td className="row">
                    <Button className="small" onPress={() => save(`${c.id}.pem`, c.credential.certificatePem ?? "", "application/x-pem-file")}>{texts.download}</Button>
                    {session.may("write") && !c.revokedDate && <Button className="small danger" onPress={() => setRevoking(c.id)}>{t.revoke}</Button>}
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
      {revoking && <Revoke serial={revoking} onClose={(done) => { setRevoking(undefined); if (done) void queries.invalidateQueries({ queryKey: key }); }} />}
    </section>
  );
}

function State({ of: c }: { of: Pick<Certificate, "revokedDate" | "revocationReason" | "credential"> }) {
  if (c.revokedDate) return <span className="bad">{t.revoked} {time(millis(c.revokedDate))}{c.revocationReason ? ` (${t.reason[c.revocationReason]})` : ""}</span>;
  return millis(c.credential.validUntilDate) < Date.now() ? <span>{t.over}</span> : <span className="good">{t.good}</span>;
}

function Revoke({ serial, onClose }: { serial: string; onClose: (done: boolean) => void }) {
  const { hub } = useApp();
  const [reason, setReason] = useState<(typeof reasons)[number]>("unspecified");
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<unknown>();
  const run = () => {
    setBusy(true);
    hub.api.DELETE(records, { params: { query: { idFilter: [serial], reason } } }).then(() => onClose(true), (e: unknown) => { setError(e); setBusy(false); });
  };
  return (
    <Window title={t.revoke} open onClose={() => onClose(false)}>
      <p>{t.revokeMore} <code>{serial}</code></p>
      <Choice label={t.why} value={reason} onChange={setReason} options={reasons.map((r) => [r, t.reason[r]] as const)} />
      <Failure error={error} />
      <p className="buttons"><Button onPress={() => onClose(false)}>{texts.cancel}</Button><Button className="danger" isDisabled={busy} onPress={run}>{t.revoke}</Button></p>
    </Window>
  );
}

export function PreSharedKey({ id }: { id: string }) {
  const { hub, session } = useApp();
  const queries = useQueryClient();
  const key = ["device", id, "psk"];
  const params = { params: { path: { deviceId: id } } };
  const { data, error, isPending, refetch } = useQuery({
    queryKey: key,
    queryFn: async () => {
      try {
        return (await hub.api.GET("/api/v1/devices/{deviceId}/pre-shared-key", params)).data!;
      } catch (e) {
        if (e instanceof HubError && e.status === 404) return null;
        throw e;
      }
    },
  });
  const [made, setMade] = useState<{ identity: string; key: string }>();
  const [asking, setAsking] = useState<"make" | "remove">();
  const [busy, setBusy] = useState(false);
  const [failed, setFailed] = useState<unknown>();
  const run = () => {
    setBusy(true);
    setFailed(undefined);
    const change = asking === "make"
      ? hub.api.POST("/api/v1/devices/{deviceId}/pre-shared-key", params).then(({ data: d }) => setMade({ identity: d!.identity, key: d!.key ?? "" }))
      : hub.api.DELETE("/api/v1/devices/{deviceId}/pre-shared-key", params).then(() => setMade(undefined));
    change.then(() => { setAsking(undefined); void queries.invalidateQueries({ queryKey: key }); }, setFailed).finally(() => setBusy(false));
  };
  return (
    <section className="card" aria-labelledby="psk">
      <h2 id="psk">{t.psk}</h2>
      <Failure error={error} retry={() => void refetch()} />
      {isPending && <Loading />}
      {data === null && <p className="loading">{t.noPsk}</p>}
      {data && <Facts of={[[t.identity, <code key="i">{line(data.identity, 100)}</code>], [t.made, data.createdAt ? time(Date.parse(data.createdAt)) : "–"], [t.madeBy, line(data.createdBy ?? "", 60) || "–"]]} />}
      {made && (
        <div className="once" role="status">
          <p><strong>{t.once}</strong></p>
          <p className="row"><code>{made.key}</code> <Copy text={made.key} /> <Button className="small" onPress={() => setMade(undefined)}>{texts.close}</Button></p>
        </div>
      )}
      {session.may("write") && (
        <p className="row">
          <Button className="small" onPress={() => setAsking("make")}>{data ? t.replace : t.make}</Button>
          {data && <Button className="small danger" onPress={() => setAsking("remove")}>{t.remove}</Button>}
        </p>
      )}
      <Window title={asking === "remove" ? t.remove : data ? t.replace : t.make} open={asking !== undefined} onClose={() => setAsking(undefined)}>
        <p>{asking === "remove" ? t.removeMore : data ? t.replaceMore : t.makeMore}</p>
        <Failure error={failed} />
        <p className="buttons">
          <Button onPress={() => setAsking(undefined)}>{texts.cancel}</Button>
          <Button className={asking === "remove" || data ? "danger" : "primary"} isDisabled={busy} onPress={run}>{asking === "remove" ? t.remove : t.make}</Button>
        </p>
      </Window>
    </section>
  );
}
