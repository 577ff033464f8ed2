/** The start: whose hub, who is signed in, then the pages. */
import { QueryClient, QueryClientProvider } from "@tanstack/react-query";
import { RouterProvider } from "@tanstack/react-router";
import { StrictMode, type ReactNode } from "react";
import { createRoot } from "react-dom/client";
import { AppContext, HubError, newApp } from "./api";
import { router } from "./routes";
import { Session, type Client } from "./session";
import "./style.css";
import { texts } from "./texts";
import { apply } from "./theme";
import { Failure } from "./ui";

const queries = new QueryClient({
  defaultOptions: { queries: { retry: (n, error) => n < 2 && !(error instanceof HubError && error.status < 500), staleTime: 5_000 } },
});

async function start(): Promise<ReactNode> {
  const response = await fetch("/.well-known/configuration", { headers: { Accept: "application/json" } });
  const { authority, webOauthClient } = (await response.json()) as { authority: string; webOauthClient?: Client };
  if (!webOauthClient?.clientId) throw new Error(texts.account.notConfigured);
  const session = await Session.begin(webOauthClient, authority);
  if (!session) return null; // on the way to the provider
  return (
    <QueryClientProvider client={queries}>
      <AppContext value={newApp(session)}>
        <RouterProvider router={router} />
      </AppContext>
    </QueryClientProvider>
  );
}

apply();
const root = createRoot(document.getElementById("root")!);
start().then(
  (page) => root.render(<StrictMode>{page}</StrictMode>),
  (error: unknown) => root.render(<main className="alone"><h1>{texts.account.failed}</h1><Failure error={error} retry={() => location.assign("/")} /></main>),
);
