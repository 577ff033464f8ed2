/** Who is let in and why: certificates, devices that enrol, one-time tokens, accounts, and what was done by whom. */
import { Link, useNavigate, useSearch } from "@tanstack/react-router";
import { useInfiniteQuery, useMutation, useQueryClient } from "@tanstack/react-query";
import { useMemo, useState, type ReactNode } from "react";
import { Tab, TabList, TabPanel, Tabs } from "react-aria-components";
import type { Element, Lists } from "@coaphub/client";
import { millis, reasons, records, useApp, type components } from "./api";
import { texts } from "./texts";
import { Button, Choice, Code, Confirm, Copy, Failure, Field, Loading, Moment, Reason, Window } from "./ui";

const t = texts.security;
type Schemas = components["schemas"];

export function SecurityPage() {
  const { session } = useApp();
  const { tab } = useSearch({ from: "/security" });
  const navigate = useNavigate();
  const tabs: [string, string, () => ReactNode][] = [
    ["certificates", t.certificates, () => <Certificates />], ["enrolments", t.enrolments, () => <Enrolments />], ["groups", t.groups, () => <Groups />],
    ["tokens", t.tokens, () => <Tokens />], ["refusals", t.refusals, () => <Refusals />],
    ...(session.may("admin") ? ([["accounts", t.accounts, () => <Accounts />], ["audit", t.audit, () => <Audit />]] as [string, string, () => ReactNode][]) : []),
  ];
  return (
    <>
      <h1>{t.title}</h1>
      <Tabs selectedKey={tab ?? "certificates"} onSelectionChange={(k) => void navigate({ to: "/security", search: { tab: String(k) }, replace: true })}>
        <TabList aria-label={t.title}>{tabs.map(([id, name]) => <Tab key={id} id={id}>{name}</Tab>)}</TabList>
        {tabs.map(([id, , show]) => <TabPanel key={id} id={id}>{show()}</TabPanel>)}
      </Tabs>
    </>
  );
}

const pageSize = 100;

/** A list in pages: as much as was asked for, and a button for more. */
function useList<P extends Lists>(path: P, query: Record<string, unknown> = {}, every?: number) {
  const { hub } = useApp();
  return useInfiniteQuery({
    queryKey: [path, query], initialPageParam: "", ...(every ? { refetchInterval: every } : {}),
    queryFn: ({ pageParam }) => hub.page(path, { query: { limit: pageSize, ...query, ...(pageParam ? { cursor: pageParam } : {}) } } as never),
    getNextPageParam: (last) => last.cursor,
  });
}

type Column<E> = readonly [string, (e: E) => ReactNode];

function List<P extends Lists>({ list, columns, label, empty, id }: {
  list: ReturnType<typeof useList<P>>; columns: readonly Column<Element<P>>[]; label: string; empty: string; id: (e: Element<P>) => string;
}) {
  const rows = useMemo(() => list.data?.pages.flatMap((p) => p.elements) ?? [], [list.data]);
  if (list.isPending) return <Loading />;
  return (
    <>
      <Failure error={list.error ?? list.data?.pages.at(-1)?.error} retry={() => void list.refetch()} />
      {rows.length === 0 && !list.error ? <p className="empty">{empty}</p> : (
        <div className="scroll" tabIndex={0} role="region" aria-label={label}>
          <table>
            <thead><tr>{columns.map(([name]) => <th key={name}>{name}</th>)}</tr></thead>
            <tbody>{rows.map((r) => <tr key={id(r)}>{columns.map(([name, show]) => <td key={name}>{show(r)}</td>)}</tr>)}</tbody>
          </table>
        </div>
      )}
      {list.hasNextPage && <p className="buttons"><Button onPress={() => void list.fetchNextPage()} isDisabled={list.isFetchingNextPage}>{t.more}</Button></p>}
    </>
  );
}

const ofDevice = (id: string | undefined) => (id ? <Link to="/devices/$id" params={{ id }}><code>{id}</code></Link> : "");

function useAct<V>(path: Lists, act: (v: V) => Promise<unknown>) {
  const queries = useQueryClient();
  return useMutation({ mutationFn: act, onSuccess: () => queries.invalidateQueries({ queryKey: [path] }) });
}

function Certificates() {
  const { hub, session } = useApp();
  const [device, setDevice] = useState("");
  const id = device.trim().toLowerCase();
  const whole = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(id);
  const list = useList(records, whole ? { deviceIdFilter: [id] } : {});
  const [revoking, setRevoking] = useState<Schemas["SigningRecord"] | undefined>();
  const [reason, setReason] = useState<(typeof reasons)[number]>("unspecified");
  const queries = useQueryClient();
  const now = Date.now();
  const state = (r: Schemas["SigningRecord"]) => (r.revokedDate ? t.revoked : millis(r.credential.validUntilDate) < now ? t.ended : t.good);
  return (
    <>
      <Report />
      <Field label={t.device} value={device} onChange={setDevice} hint={t.deviceHint} />
      <List
        list={list} label={t.certificates} empty={t.noCertificates} id={(r) => r.id}
        columns={[
          [t.device, (r) => ofDevice(r.deviceId) || r.commonName], [t.state, (r) => <span className={state(r) === t.good ? "good" : ""}>{state(r)}{r.revocationReason ? `: ${r.revocationReason}` : ""}</span>],
          [t.until, (r) => <Moment at={millis(r.credential.validUntilDate)} />], [t.made, (r) => <Moment at={millis(r.creationDate)} />], [t.how, (r) => r.requestMethod],
          [t.by, (r) => r.requestedBy ?? ""], [t.serial, (r) => <code>{r.id}</code>],
          ...(session.may("write") ? [[texts.actions, (r) => state(r) === t.good && <Button className="small" onPress={() => setRevoking(r)}>{t.revoke}</Button>] as Column<Schemas["SigningRecord"]>] : []),
        ]}
      />
      <Confirm
        title={t.revoke} text={t.confirmRevoke(revoking?.id.slice(0, 8) ?? "")} word={revoking?.id.slice(0, 8) ?? ""} action={t.revoke} open={revoking !== undefined} onClose={() => setRevoking(undefined)}
        more={<Choice label={t.reason} value={reason} onChange={setReason} options={reasons.map((r) => [r, t.reasons[r]!] as const)} />}
        run={async () => {
          await hub.api.DELETE(records, { params: { query: { idFilter: [revoking!.id], reason } } });
          await queries.invalidateQueries({ queryKey: [records] });
        }}
      />
    </>
  );
}

/** How the fleet is off for certificates. */
function Report() {
  const { hub } = useApp();
  const list = useInfiniteQuery({
    queryKey: ["report"], initialPageParam: 0, getNextPageParam: () => undefined,
    queryFn: async () => (await hub.api.GET("/certificate-authority/api/v1/signing/report")).data,
  });
  const r = list.data?.pages[0];
  if (!r) return <Failure error={list.error} />;
  return <p className="row">{([[t.good, r.good], [t.soon, r.expires], [t.ended, r.ended], [t.revoked, r.revoked], [t.weak, r.weakKeys], [t.shared, r.sharedKeys]] as const).map(([name, n]) => <span key={name}><b>{n}</b> {name}</span>)}</p>;
}

const enrolments = "/api/v1/enrolments";

function Enrolments() {
  const { hub, session } = useApp();
  const [state, setState] = useState("");
  const list = useList(enrolments, state ? { stateFilter: [state] } : {}, 5_000);
  const decide = useAct(enrolments, ({ id, allow }: { id: string; allow: boolean }) => hub.api.POST("/api/v1/enrolments/decisions", { body: { deviceIdFilter: [id], allow } }));
  return (
    <>
      <Choice label={t.state} value={state} onChange={setState} options={[["", texts.all], ...["waiting", "allowed", "refused", "issued"].map((s) => [s, t.states[s] ?? s] as const)]} />
      <Failure error={decide.error} />
      <List
        list={list} label={t.enrolments} empty={t.noEnrolments} id={(e) => e.deviceId + e.method}
        columns={[
          [t.device, (e) => ofDevice(e.deviceId)],
          [t.state, (e) => <>{t.states[e.state] ?? e.state}{e.waitsFor ? `: ${t.waitsFor[e.waitsFor] ?? e.waitsFor}` : ""}{e.problem && <> <Code code={e.problem} /></>}</>],
          [t.how, (e) => e.method], [t.proof, (e) => e.proof ?? ""], [t.group, (e) => <code>{e.enrollmentGroupId ?? ""}</code>], [t.changed, (e) => <Moment at={millis(e.changeDate)} />], [t.by, (e) => e.decidedBy ?? ""],
          ...(session.may("write")
            ? [[texts.actions, (e) => e.state === "waiting" && e.waitsFor !== "terms" && (
                <span className="row">
                  <Button className="small primary" isDisabled={decide.isPending} onPress={() => decide.mutate({ id: e.deviceId, allow: true })}>{t.allow}</Button>
                  <Button className="small" isDisabled={decide.isPending} onPress={() => decide.mutate({ id: e.deviceId, allow: false })}>{t.refuse}</Button>
                </span>
              )] as Column<Schemas["Enrolment"]>]
            : []),
        ]}
      />
    </>
  );
}

const groups = "/api/v1/enrollment-groups";

function Groups() {
  const { hub, session } = useApp();
  const list = useList(groups);
  const accept = useAct(groups, (v: { enrollmentGroupId: string; version: string }) => hub.api.POST("/api/v1/enrolments/terms", { body: v }));
  const [removing, setRemoving] = useState<Schemas["EnrollmentGroup"] | undefined>();
  const queries = useQueryClient();
  return (
    <>
      <p>{t.groupsHint} <code>coaphub enroll group --help</code></p>
      <Failure error={accept.error} />
      <List
        list={list} label={t.groups} empty={t.noGroups} id={(g) => g.id}
        columns={[
          [t.name, (g) => g.name || g.id], [t.prerequisites, (g) => [g.approval && t.waitsFor["approval"], g.allow?.length && t.allowed(g.allow.length), g.deviceTypes?.join(", ")].filter(Boolean).join("; ")],
          [t.terms, (g) => g.terms && <>{g.terms.url ? <a href={g.terms.url} target="_blank" rel="noreferrer">{g.terms.version}</a> : g.terms.version} {g.acceptedTerms?.version === g.terms.version ? t.accepted : session.may("write") && <Button className="small" onPress={() => accept.mutate({ enrollmentGroupId: g.id, version: g.terms!.version! })}>{t.accept}</Button>}</>],
          [t.serial, (g) => <code>{g.id}</code>],
          ...(session.may("write") ? [[texts.actions, (g) => <Button className="small" onPress={() => setRemoving(g)}>{t.remove}</Button>] as Column<Schemas["EnrollmentGroup"]>] : []),
        ]}
      />
      <Confirm
        title={t.remove} text={t.confirmRemove(removing?.name || removing?.id || "")} word={removing?.name || removing?.id || ""} action={t.remove} open={removing !== undefined} onClose={() => setRemoving(undefined)}
        run={async () => {
          await hub.api.DELETE(groups, { params: { query: { idFilter: [removing!.id] } } });
          await queries.invalidateQueries({ queryKey: [groups] });
        }}
      />
    </>
  );
}

const tokens = "/api/v1/enrolment-tokens";

function Tokens() {
  const { hub, session } = useApp();
  const list = useList(tokens);
  const [made, setMade] = useState<string | undefined>();
  const [device, setDevice] = useState("");
  const make = useAct(tokens, async () => {
    const { data } = await hub.api.POST(tokens, { body: device.trim() ? { deviceId: device.trim().toLowerCase() } : {} });
    setMade(data?.token);
  });
  const remove = useAct(tokens, (id: string) => hub.api.DELETE(tokens, { params: { query: { idFilter: [id] } } }));
  return (
    <>
      <p>{t.tokensHint}</p>
      {session.may("write") && (
        <form className="row" onSubmit={(e) => { e.preventDefault(); make.mutate(undefined); }}>
          <Field label={t.deviceOrAny} value={device} onChange={setDevice} />
          <Button type="submit" isDisabled={make.isPending}>{t.newToken}</Button>
        </form>
      )}
      <Failure error={make.error ?? remove.error} />
      <List
        list={list} label={t.tokens} empty={t.noTokens} id={(k) => k.id}
        columns={[
          [t.device, (k) => ofDevice(k.deviceId) || t.anyDevice], [t.until, (k) => <Moment at={millis(k.expirationDate)} />], [t.used, (k) => (k.usedBy ? <>{ofDevice(k.usedBy)} <Moment at={millis(k.useDate)} /></> : "")],
          [t.by, (k) => k.createdBy ?? ""], [t.serial, (k) => <code>{k.id}</code>],
          ...(session.may("write") ? [[texts.actions, (k) => <Button className="small" onPress={() => remove.mutate(k.id)}>{t.remove}</Button>] as Column<Schemas["EnrolmentToken"]>] : []),
        ]}
      />
      <Window title={t.newToken} open={made !== undefined} onClose={() => setMade(undefined)}>
        <p>{t.shownOnce}</p>
        <pre>{made}</pre>
        <p className="buttons"><Copy text={made ?? ""} /><Button onPress={() => setMade(undefined)}>{texts.close}</Button></p>
      </Window>
    </>
  );
}

function Refusals() {
  const list = useList("/api/v1/refusals", {}, 5_000);
  return (
    <List
      list={list} label={t.refusals} empty={t.noRefusals} id={(r) => `${r.time} ${r.remote} ${r.what}`}
      columns={[
        [t.when, (r) => <Moment at={Date.parse(r.time)} />], [t.device, (r) => ofDevice(r.device)], [t.what, (r) => r.what],
        [t.reason, (r) => <Reason of={r.reason} />],
        [t.remote, (r) => <code>{r.remote}</code>],
      ]}
    />
  );
}

const accounts = "/api/v1/accounts";
type Role = Schemas["Roles"][number];

function Accounts() {
  const { hub } = useApp();
  const list = useList(accounts);
  const [name, setName] = useState("");
  const [role, setRole] = useState<Role>("user");
  const [shown, setShown] = useState<{ name: string; password: string } | undefined>();
  const show = (a: { account: { name: string }; password?: string } | undefined) => a?.password && setShown({ name: a.account.name, password: a.password });
  const add = useAct(accounts, async () => {
    show((await hub.api.POST(accounts, { body: { name: name.trim(), roles: [role] } })).data);
    setName("");
  });
  const reset = useAct(accounts, async (n: string) => show((await hub.api.PUT("/api/v1/accounts/{name}/password", { params: { path: { name: n } }, body: {} })).data));
  const roles = useAct(accounts, ({ n, r }: { n: string; r: Role }) => hub.api.PUT("/api/v1/accounts/{name}/roles", { params: { path: { name: n } }, body: { roles: [r] } }));
  const options = (["admin", "user", "viewer"] as const).map((r) => [r, t.roles[r]!] as const);
  return (
    <>
      <form className="row" onSubmit={(e) => { e.preventDefault(); add.mutate(undefined); }}>
        <Field label={t.name} value={name} onChange={setName} required />
        <Choice label={t.role} value={role} onChange={setRole} options={options} />
        <Button type="submit" isDisabled={add.isPending}>{t.addAccount}</Button>
      </form>
      <Failure error={add.error ?? reset.error ?? roles.error} />
      <List
        list={list} label={t.accounts} empty={t.noAccounts} id={(a) => a.name}
        columns={[
          [t.name, (a) => a.name],
          [t.role, (a) => <Choice label={`${t.role}: ${a.name}`} hidden value={a.roles[0] ?? "viewer"} onChange={(r) => roles.mutate({ n: a.name, r })} options={options} />],
          [t.lastLogin, (a) => <Moment at={a.lastLogin ? Date.parse(a.lastLogin) : 0} />], [t.state, (a) => (a.mustChange ? t.mustChange : "")],
          [texts.actions, (a) => <Button className="small" onPress={() => reset.mutate(a.name)}>{t.resetPassword}</Button>],
        ]}
      />
      <Window title={shown?.name ?? ""} open={shown !== undefined} onClose={() => setShown(undefined)}>
        <p>{t.passwordOnce}</p>
        <pre>{shown?.password}</pre>
        <p className="buttons"><Copy text={shown?.password ?? ""} /><Button onPress={() => setShown(undefined)}>{texts.close}</Button></p>
      </Window>
    </>
  );
}

function Audit() {
  const list = useList("/api/v1/audit");
  return (
    <List
      list={list} label={t.audit} empty={t.noAudit} id={(e) => e.number}
      columns={[
        [t.when, (e) => <Moment at={Date.parse(e.time)} />], [t.by, (e) => e.user], [t.call, (e) => e.call], [t.target, (e) => <code>{e.target ?? ""}</code>],
        [t.outcome, (e) => (e.outcome === "ok" ? "ok" : <Code code={e.outcome} />)], [t.door, (e) => e.door],
        [t.remote, (e) => <code>{e.remote ?? ""}</code>],
      ]}
    />
  );
}
