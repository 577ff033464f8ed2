/** Who a device is and how it is, and what can be done with all of it. */
import { useNavigate } from "@tanstack/react-router";
import { useQuery, useQueryClient } from "@tanstack/react-query";
import { useState } from "react";
import { Menu, MenuItem, MenuTrigger, Popover } from "react-aria-components";
import { useApp, type Device } from "./api";
import { Labels } from "./device-labels";
import type { Picture } from "./device-store";
import { texts } from "./texts";
import { Button, Choice, Confirm, Copy, Dot, Failure, Field, Window } from "./ui";
import { line } from "./visible";

const t = texts.device.head;

export function Head({ id, device, picture }: { id: string; device: Device | undefined; picture: Picture }) {
  const { session } = useApp();
  const metadata = picture.metadata ?? device?.metadata;
  const connection = metadata?.connection;
  const name = device?.name ?? "";
  const maker = [device?.manufacturerName?.[0]?.value, device?.modelNumber].filter(Boolean).join(" ");
  const sync = metadata?.twinEnabled ? (texts.sync[metadata.twinSynchronization?.state ?? ""] ?? "") : texts.devices.twinOff;
  return (
    <header className="head">
      <div className="row spread">
        <h1><bdi>{line(name, 100) || texts.devices.unnamed}</bdi></h1>
        {session.may("write") && <Actions id={id} name={name} twin={metadata?.twinEnabled ?? false} />}
      </div>
      <p className="row">
        <Dot on={connection?.status === "ONLINE"} />
        <span>{t.twin}: {sync}</span>
        {maker && <bdi>{line(maker, 120)}</bdi>}
        <code>{id}</code> <Copy text={id} label={t.copyId} />
      </p>
      <div className="chips">
        {(device?.types ?? []).map((x) => <code key={x} className="chip">{line(x, 80)}</code>)}
        {device && <Labels id={id} labels={device.labels ?? {}} />}
      </div>
      <AccessState id={id} />
    </header>
  );
}

export function useAccess(id: string) {
  const { hub } = useApp();
  return useQuery({
    queryKey: ["device", id, "access"], refetchInterval: 30_000,
    queryFn: async () => (await hub.api.GET("/api/v1/devices/{deviceId}/access", { params: { path: { deviceId: id } } })).data!,
  });
}

function AccessState({ id }: { id: string }) {
  const { data } = useAccess(id);
  if (!data || data.state === "admitted") return null;
  return (
    <p className="banner access" role="status">
      <strong>{t.access[data.state]}</strong> {data.reason && <bdi>{line(data.reason, 500)}</bdi>} {data.user && <small>{line(data.user, 100)}</small>}
    </p>
  );
}

/** A word that can be typed: the name, or the beginning of the ID where the name has what no keyboard has. */
export function typable(name: string, id: string): string {
  return name.length > 0 && name.length <= 60 && name === name.trim() && /^[\p{L}\p{N}\p{P}\p{S} ]+$/u.test(name) ? name : id.slice(0, 8);
}

function Actions({ id, name, twin }: { id: string; name: string; twin: boolean }) {
  const { hub } = useApp();
  const queries = useQueryClient();
  const navigate = useNavigate();
  const access = useAccess(id);
  const [open, setOpen] = useState<"delete" | "access" | "">("");
  const [doing, setDoing] = useState("");
  const [error, setError] = useState<unknown>();
  const setTwin = (body: { twinEnabled: boolean } | { twinForceSynchronization: true }, text: string) => {
    setDoing(text);
    setError(undefined);
    hub.api.PUT("/api/v1/devices/{deviceId}/metadata", { params: { path: { deviceId: id }, header: { "Idempotency-Key": crypto.randomUUID() } }, body })
      .catch(setError).finally(() => setDoing(""));
  };
  const act = (key: React.Key) => {
    if (key === "resync") setTwin({ twinForceSynchronization: true }, t.resyncing);
    else if (key === "twin") setTwin({ twinEnabled: !twin }, twin ? t.twinGoesOff : t.twinGoesOn);
    else setOpen(key as "delete" | "access");
  };
  return (
    <div className="row">
      {doing && <span role="status"><span className="spinner" aria-hidden="true" /> {doing}</span>}
      <Failure error={error} />
      <MenuTrigger>
        <Button>{texts.actions} <span aria-hidden="true">▾</span></Button>
        <Popover>
          <Menu onAction={act}>
            <MenuItem id="twin">{twin ? t.twinOff : t.twinOn}</MenuItem>
            <MenuItem id="resync">{t.resync}</MenuItem>
            <MenuItem id="access">{t.letIn}</MenuItem>
            <MenuItem id="delete">{t.delete}</MenuItem>
          </Menu>
        </Popover>
      </MenuTrigger>
      <Access key={open} id={id} now={access.data?.state ?? "admitted"} open={open === "access"} onClose={() => setOpen("")} />
      <Confirm
        title={t.delete} text={texts.devices.confirmOne(typable(name, id))} word={typable(name, id)} action={t.delete} open={open === "delete"} onClose={() => setOpen("")}
        run={async () => {
          await hub.api.DELETE("/api/v1/devices/{deviceId}", { params: { path: { deviceId: id } } });
          queries.removeQueries({ queryKey: ["device", id] });
          await navigate({ to: "/" });
        }}
      />
    </div>
  );
}

const states = ["admitted", "quarantined", "disabled"] as const;

/** Whether the hub lets the device in, and why not. */
function Access({ id, now, open, onClose }: { id: string; now: string; open: boolean; onClose: () => void }) {
  const { hub } = useApp();
  const queries = useQueryClient();
  const [state, setState] = useState<(typeof states)[number]>(states.find((s) => s === now) ?? "admitted");
  const [reason, setReason] = useState("");
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<unknown>();
  const run = () => {
    setBusy(true);
    setError(undefined);
    hub.api.PUT("/api/v1/devices/{deviceId}/access", { params: { path: { deviceId: id } }, body: { state, ...(reason ? { reason } : {}) } }).then(({ data }) => {
      queries.setQueryData(["device", id, "access"], data);
      onClose();
    }, setError).finally(() => setBusy(false));
  };
  return (
    <Window title={t.letIn} open={open} onClose={onClose}>
      <form onSubmit={(e) => { e.preventDefault(); if (!busy) run(); }}>
        <Choice label={t.letInNow} value={state} onChange={setState} options={states.map((s) => [s, t.state[s]] as const)} />
        <p>{t.stateMore[state]}</p>
        <Field label={t.reason} value={reason} onChange={setReason} hint={t.reasonHint} />
        <Failure error={error} />
        <p className="buttons"><Button onPress={onClose}>{texts.cancel}</Button><Button type="submit" className={state === "admitted" ? "primary" : "danger"} isDisabled={busy}>{texts.save}</Button></p>
      </form>
    </Window>
  );
}
