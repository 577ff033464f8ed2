/** The page of one device. */
import { useQuery, useQueryClient } from "@tanstack/react-query";
import { Link, useNavigate, useParams, useSearch } from "@tanstack/react-router";
import { lazy, Suspense, useEffect, useState, useSyncExternalStore } from "react";
import { Tab, TabList, TabPanel, Tabs } from "react-aria-components";
import { HubError, useApp } from "./api";
import { Commands } from "./device-commands";
import { Head } from "./device-head";
import { Overview } from "./device-overview";
import { Resources } from "./device-resources";
import { DeviceStore } from "./device-store";
import { texts } from "./texts";
import { Failure, Loading } from "./ui";

const t = texts.device;
const History = lazy(() => import("./history").then((m) => ({ default: m.History })));
const tabs = ["resources", "overview", "commands", "history"] as const;
type TabName = (typeof tabs)[number];

export function DevicePage() {
  const { id } = useParams({ from: "/devices/$id" });
  return <Page key={id} id={id} />;
}

function Page({ id }: { id: string }) {
  const app = useApp();
  const queries = useQueryClient();
  const [store] = useState(() => new DeviceStore(app, id));
  const picture = useSyncExternalStore(store.listen, store.get);
  const device = useQuery({
    queryKey: ["device", id],
    queryFn: async () => (await app.hub.api.GET("/api/v1/devices/{deviceId}", { params: { path: { deviceId: id } } })).data!,
  });
  // Who the device says it is, is read again when that changes; labels are.
  const said = `${picture.twins.get("/oic/d")?.version} ${picture.twins.get("/oic/p")?.version}`;
  useEffect(() => void queries.invalidateQueries({ queryKey: ["device", id], exact: true }), [said, queries, id]);
  const { tab: asked } = useSearch({ from: "/devices/$id" });
  const navigate = useNavigate();
  const tab: TabName = tabs.find((x) => x === asked) ?? "resources";
  const [seen, setSeen] = useState<ReadonlySet<string>>(new Set([tab]));
  useEffect(() => setSeen((old) => (old.has(tab) ? old : new Set(old).add(tab))), [tab]);

  // A device that has not said yet who it is has no entry, and yet what it published is there.
  const early = device.error instanceof HubError && device.error.status === 404;
  if (picture.gone) return <div className="empty"><p>{t.deleted}</p><Link to="/">{t.toList}</Link></div>;
  if (picture.refused) return <Failure error={new Error(picture.refused)} />;
  if (!device.data && picture.metadata === undefined) {
    if (device.error) return <div><Failure error={device.error} retry={() => void device.refetch()} /><Link to="/">{t.toList}</Link></div>;
    return <Loading />;
  }
  return (
    <div className="device">
      <Head id={id} device={device.data} picture={picture} />
      {!early && <Failure error={device.error} retry={() => void device.refetch()} />}
      <Tabs selectedKey={tab} onSelectionChange={(k) => void navigate({ to: "/devices/$id", params: { id }, search: (old) => ({ ...old, tab: String(k) }), replace: true })}>
        <TabList aria-label={t.tabs}>
          <Tab id="resources">{t.tab.resources}</Tab>
          <Tab id="overview">{t.tab.overview}</Tab>
          <Tab id="commands">{picture.waiting.length > 0 ? t.tab.commandsWaiting(picture.waiting.length) : t.tab.commands}</Tab>
          <Tab id="history">{t.tab.history}</Tab>
        </TabList>
        {/* What was begun in a tab stays when another is looked at. */}
        <TabPanel id="resources" shouldForceMount={seen.has("resources")}><Resources deviceId={id} store={store} picture={picture} /></TabPanel>
        <TabPanel id="overview"><Overview id={id} device={device.data} picture={picture} /></TabPanel>
        <TabPanel id="commands"><Commands deviceId={id} picture={picture} /></TabPanel>
        <TabPanel id="history" shouldForceMount={seen.has("history")}>
          <Suspense fallback={<Loading />}><History deviceId={id} store={store} picture={picture} shown={tab === "history"} /></Suspense>
        </TabPanel>
      </Tabs>
    </div>
  );
}
