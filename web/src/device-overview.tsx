/** What is known of a device besides its resources: how it is attached, and by what it proves who it is. */
import { useQuery } from "@tanstack/react-query";
import { useEffect } from "react";
import { HubError, millis, useApp, type Device } from "./api";
import { Certificates, PreSharedKey } from "./device-credentials";
import type { Picture } from "./device-store";
import { bytes, time } from "./format";
import { texts } from "./texts";
import { Facts, Failure, Loading, Moment } from "./ui";
import { line } from "./visible";

const t = texts.device.connection;

export function Overview({ id, device, picture }: { id: string; device: Device | undefined; picture: Picture }) {
  return (
    <>
      <section className="card" aria-labelledby="connection"><h2 id="connection">{t.title}</h2><Attached id={id} device={device} picture={picture} /></section>
      <Certificates id={id} />
      <PreSharedKey id={id} />
      <section className="card" aria-labelledby="identity">
        <h2 id="identity">{t.identity}</h2>
        <Facts
          of={[
            [t.id, <code key="i">{id}</code>], [t.name, <bdi key="n">{line(device?.name ?? "", 200) || "–"}</bdi>],
            [t.manufacturer, device?.manufacturerName?.map((m) => line(`${m.value ?? ""}${m.language ? ` (${m.language})` : ""}`, 100)).join(", ") || "–"],
            [t.model, line(device?.modelNumber ?? "", 100) || "–"], [t.types, line(device?.types?.join(", ") ?? "", 300) || "–"],
            [t.interfaces, line(device?.interfaces?.join(", ") ?? "", 300) || "–"], [t.piid, line(device?.protocolIndependentId ?? "", 100) || "–"],
          ]}
        />
      </section>
    </>
  );
}

function Attached({ id, device, picture }: { id: string; device: Device | undefined; picture: Picture }) {
  const { hub } = useApp();
  const metadata = picture.metadata ?? device?.metadata;
  const known = metadata?.connection;
  const { data, error, refetch, isPending } = useQuery({
    queryKey: ["device", id, "connection"], refetchInterval: 10_000,
    queryFn: async () => (await hub.api.GET("/api/v1/devices/{deviceId}/connection", { params: { path: { deviceId: id } } })).data!,
  });
  useEffect(() => void refetch(), [known?.id, known?.status, refetch]);
  const unseen = error instanceof HubError && error.code === "device-not-seen";
  const facts: [string, React.ReactNode][] = [
    [t.state, known?.status === "ONLINE" ? texts.devices.online : texts.devices.offline],
    [t.since, <span key="s"><Moment at={millis(known?.connectedAt)} /> <small>{time(millis(known?.connectedAt))}</small></span>],
    [t.protocol, texts.protocol[known?.protocol ?? ""] ?? known?.protocol ?? "–"],
    [t.local, (known?.localEndpoints ?? []).map((e) => line(e, 100)).join(", ") || "–"],
  ];
  if (metadata?.nextContact && metadata.nextContact !== "0") facts.push([t.next, <Moment key="n" at={millis(metadata.nextContact)} />]);
  if (metadata?.contactInterval && metadata.contactInterval !== "0") facts.push([t.every, seconds(Number(metadata.contactInterval) / 1e9)]);
  if (data) {
    facts.push(
      [t.remote, line(data.remote, 100) || "–"], [t.transport, `${data.protocol}${data.tls ? `, ${data.tls}` : ""}`], [t.roundTrip, data.roundTripSeconds ? seconds(data.roundTripSeconds) : "–"],
      [t.bytesIn, bytes(data.bytesIn)], [t.bytesOut, bytes(data.bytesOut)], [t.lastError, data.lastError ? <bdi key="e" className="bad">{line(data.lastError, 400)}</bdi> : texts.none],
    );
    if (data.endedAt) facts.push([t.ended, <span key="x"><Moment at={Date.parse(data.endedAt)} /> {line(data.endReason ?? "", 200)}</span>]);
    if (data.rivalsAt) facts.push([t.rivals, <span key="r" className="bad"><Moment at={Date.parse(data.rivalsAt)} /> {line(data.rivals ?? "", 300)}</span>]);
    if (data.quarantined) facts.push([t.quarantined, texts.yes]);
  }
  return (
    <>
      <Facts of={facts} />
      {isPending && <Loading />}
      {unseen ? <p><small>{t.unseen}</small></p> : <Failure error={error} retry={() => void refetch()} />}
    </>
  );
}

function seconds(s: number): string {
  if (s < 1) return `${(1000 * s).toPrecision(3)} ms`;
  if (s < 120) return `${Number(s.toPrecision(3))} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  return `${Math.round(s / 3600)} h`;
}
