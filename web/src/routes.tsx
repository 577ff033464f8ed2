/** Which page is where. Each is a file of its own that is fetched when it is first looked at. */
import { createRootRoute, createRoute, createRouter, lazyRouteComponent } from "@tanstack/react-router";
import { DevicesPage } from "./devices";
import { Shell } from "./shell";
import { texts } from "./texts";
import { Failure, Loading } from "./ui";

const root = createRootRoute({ component: Shell, notFoundComponent: () => <p>{texts.pageUnknown}</p> });

const text = (v: unknown) => (typeof v === "string" ? v : typeof v === "number" ? String(v) : "");

const devices = createRoute({
  getParentRoute: () => root, path: "/", component: DevicesPage,
  validateSearch: (q: Record<string, unknown>): { q?: string; status?: string; type?: string; label?: string } =>
    Object.fromEntries((["q", "status", "type", "label"] as const).map((k) => [k, text(q[k])]).filter(([, v]) => v !== "")),
});
const device = createRoute({
  getParentRoute: () => root, path: "/devices/$id", component: lazyRouteComponent(() => import("./device"), "DevicePage"),
  validateSearch: (q: Record<string, unknown>): { tab?: string; href?: string } =>
    Object.fromEntries((["tab", "href"] as const).map((k) => [k, text(q[k])]).filter(([, v]) => v !== "")),
});
const add = createRoute({ getParentRoute: () => root, path: "/add", component: lazyRouteComponent(() => import("./onboarding"), "OnboardingPage") });
const events = createRoute({ getParentRoute: () => root, path: "/events", component: lazyRouteComponent(() => import("./events"), "EventsPage") });
const security = createRoute({
  getParentRoute: () => root, path: "/security", component: lazyRouteComponent(() => import("./security"), "SecurityPage"),
  validateSearch: (q: Record<string, unknown>): { tab?: string } => (text(q["tab"]) ? { tab: text(q["tab"]) } : {}),
});
const system = createRoute({
  getParentRoute: () => root, path: "/system", component: lazyRouteComponent(() => import("./system"), "SystemPage"),
  validateSearch: (q: Record<string, unknown>): { tab?: string } => (text(q["tab"]) ? { tab: text(q["tab"]) } : {}),
});

export const router = createRouter({
  routeTree: root.addChildren([devices, device, add, events, security, system]), defaultPreload: "intent",
  defaultErrorComponent: ({ error, reset }) => <Failure error={error} retry={reset} />, defaultPendingComponent: () => <Loading />,
});

declare module "@tanstack/react-router" {
  interface Register {
    router: typeof router;
  }
}
