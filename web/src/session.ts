/**
 * Who is signed in: the authorization code flow with PKCE (RFC 7636, RFC 9700) against the provider that the hub names, silent
 * renewal by refresh token, and signing in again in a window of its own, so that a half-filled form survives the end of a token.
 *
 * All tabs have one session, in localStorage: a new tab asks nobody for a password, and signing out is for all of them. A refresh
 * token is used once, so tabs take turns at renewing (Web Locks), and whoever comes later finds what the first one got.
 */

export interface Client {
  clientId: string;
  audience?: string;
  scopes?: string[];
}

interface Provider {
  issuer: string;
  authorization_endpoint: string;
  token_endpoint: string;
  end_session_endpoint?: string;
  revocation_endpoint?: string;
}

interface Tokens {
  access: string;
  refresh?: string;
  id?: string;
  /** Unix milliseconds. */
  ends: number;
  scopes: string[];
  user: string;
}

interface Flow {
  state: string;
  verifier: string;
  /** Where to go on in the console; "": this window only signs in again. */
  back: string;
  redirect: string;
  /** Unix milliseconds. */
  begun: number;
}

export class SignInError extends Error {}

const tokensKey = "coaphub.tokens";
const flowKey = "coaphub.flow";
const lockName = "coaphub.session";
const renewBefore = 30_000;

type State = "in" | "expired";

export class Session {
  #client: Client;
  #provider: Provider;
  #tokens: Tokens;
  #renewing: Promise<string> | undefined;
  #state: State = "in";
  readonly #heard = new Set<() => void>();
  readonly #waiting = new Set<(t: string) => void>();

  private constructor(client: Client, provider: Provider, tokens: Tokens) {
    this.#client = client;
    this.#provider = provider;
    this.#tokens = tokens;
    keep(tokens);
    addEventListener("storage", ({ key }) => {
      if (key !== tokensKey) return;
      const now = read<Tokens>(tokensKey);
      if (now) this.#take(now);
      else this.#to("expired"); // signed out elsewhere
    });
  }

  get user(): string {
    return this.#tokens.user;
  }

  get state(): State {
    return this.#state;
  }

  /** What the token may not do is not offered. */
  may(what: "read" | "write" | "admin"): boolean {
    return this.#tokens.scopes.includes(what === "admin" ? what : `devices:${what}`);
  }

  /** Is told when the state changes. Returns what ends that. */
  listen = (f: () => void): (() => void) => {
    this.#heard.add(f);
    return () => this.#heard.delete(f);
  };

  /** A token that is good for a while, and another one if that was refused. Waits for as long as the person has to sign in again. */
  token = async (refused = false): Promise<string> => {
    if (!refused && this.#state === "in" && this.#tokens.ends - Date.now() > renewBefore) return this.#tokens.access;
    return this.#renewed();
  };

  #renewed(): Promise<string> {
    this.#renewing ??= this.#renew().finally(() => (this.#renewing = undefined));
    return this.#renewing;
  }

  async #renew(): Promise<string> {
    if (this.#state === "in") {
      const renewed = await navigator.locks.request(lockName, () => this.#refresh());
      if (renewed) return renewed;
    }
    this.#to("expired");
    return new Promise((resolve) => this.#waiting.add(resolve));
  }

  /** Another token, or undefined when the provider gives none. */
  async #refresh(): Promise<string | undefined> {
    const kept = read<Tokens>(tokensKey);
    if (kept && kept.access !== this.#tokens.access && kept.user === this.#tokens.user && kept.ends - Date.now() > renewBefore) {
      this.#tokens = kept; // another tab was first
      return kept.access;
    }
    const refresh = kept?.refresh;
    if (!refresh) return undefined;
    for (let pause = 500; ; pause = Math.min(2 * pause, 15_000)) {
      try {
        this.#tokens = await exchange(this.#provider, { grant_type: "refresh_token", client_id: this.#client.clientId, refresh_token: refresh });
        keep(this.#tokens);
        return this.#tokens.access;
      } catch (error) {
        if (error instanceof SignInError) return undefined; // the provider said no
        await new Promise((r) => setTimeout(r, pause)); // nobody answered
      }
    }
  }

  #take(tokens: Tokens): void {
    if (tokens.user !== this.#tokens.user) {
      location.assign("/"); // what is on the page belongs to somebody else
      return;
    }
    this.#tokens = tokens;
    this.#to("in");
    for (const resolve of this.#waiting) resolve(tokens.access);
    this.#waiting.clear();
  }

  #to(state: State): void {
    this.#state = state;
    for (const f of this.#heard) f();
  }

  /** Opens a window to sign in again; the page stays as it is. To be called by a click, or browsers refuse the window. */
  async signInAgain(): Promise<void> {
    const window = globalThis.open("about:blank", "coaphub-sign-in", "popup,width=480,height=640");
    const { url, flow } = await authorize(this.#client, this.#provider, window ? "" : location.pathname + location.search);
    localStorage.setItem(`${flowKey}.${flow.state}`, JSON.stringify(flow));
    if (window) window.location.href = url;
    else location.assign(url);
  }

  async signOut(): Promise<void> {
    const { refresh, id } = this.#tokens;
    localStorage.removeItem(tokensKey);
    const p = this.#provider;
    if (p.revocation_endpoint && refresh) {
      const body = new URLSearchParams({ client_id: this.#client.clientId, token: refresh, token_type_hint: "refresh_token" });
      await fetch(p.revocation_endpoint, { method: "POST", body }).catch(() => undefined);
    }
    if (!p.end_session_endpoint) {
      location.assign("/");
      return;
    }
    const q = new URLSearchParams({ client_id: this.#client.clientId, post_logout_redirect_uri: `${location.origin}/` });
    if (id) q.set("id_token_hint", id);
    location.assign(`${p.end_session_endpoint}?${q}`);
  }

  /** Signs in, which may leave the page and come back to where it was. Undefined: the page is about to be left. */
  static async begin(client: Client, authority: string): Promise<Session | undefined> {
    const here = new URL(location.href);
    const [code, state, refused] = ["code", "state", "error"].map((p) => here.searchParams.get(p));
    const kept = read<Tokens>(tokensKey);
    if (!state && kept && (kept.ends > Date.now() || kept.refresh)) return new Session(client, await discover(authority), kept);

    const provider = await discover(authority);
    const flow = state ? read<Flow>(`${flowKey}.${state}`) : undefined;
    if (state && flow?.state === state) {
      localStorage.removeItem(`${flowKey}.${state}`);
      if (refused) throw new SignInError(here.searchParams.get("error_description") ?? refused);
      const tokens = await exchange(provider, {
        grant_type: "authorization_code", client_id: client.clientId, code: code ?? "", redirect_uri: flow.redirect, code_verifier: flow.verifier,
      });
      if (flow.back === "") {
        keep(tokens); // which the tab that waits hears
        window.close();
        return undefined;
      }
      history.replaceState(null, "", flow.back);
      return new Session(client, provider, tokens);
    }
    const { url, flow: begun } = await authorize(client, provider, state ? "/" : here.pathname + here.search + here.hash);
    for (const key of Object.keys(localStorage)) if (key.startsWith(flowKey) && !open(key)) localStorage.removeItem(key);
    localStorage.setItem(`${flowKey}.${begun.state}`, JSON.stringify(begun));
    location.replace(url);
    return undefined;
  }
}

/** Whether a sign-in that was begun may still come back. */
function open(key: string): boolean {
  return Date.now() - (read<Flow>(key)?.begun ?? 0) < 3_600_000;
}

async function discover(authority: string): Promise<Provider> {
  const response = await fetch(`${authority.replace(/\/$/, "")}/.well-known/openid-configuration`);
  if (!response.ok) throw new Error(`the provider's configuration: ${response.status}`);
  return (await response.json()) as Provider;
}

async function authorize(client: Client, provider: Provider, back: string): Promise<{ url: string; flow: Flow }> {
  const flow = { state: random(), verifier: random() + random(), back, redirect: `${location.origin}/`, begun: Date.now() };
  const q = new URLSearchParams({
    response_type: "code", client_id: client.clientId, redirect_uri: flow.redirect, state: flow.state, nonce: random(),
    scope: (client.scopes ?? ["openid", "offline_access"]).join(" "), code_challenge_method: "S256",
    code_challenge: base64url(await sha256(new TextEncoder().encode(flow.verifier))),
  });
  if (client.audience) q.set("audience", client.audience);
  return { url: `${provider.authorization_endpoint}?${q}`, flow };
}

async function exchange(provider: Provider, form: Record<string, string>): Promise<Tokens> {
  const response = await fetch(provider.token_endpoint, { method: "POST", body: new URLSearchParams(form) });
  const body = (await response.json().catch(() => ({}))) as Record<string, unknown>;
  if (response.status >= 500 || response.status === 429) throw new Error(`the provider answered ${response.status}`);
  if (!response.ok) throw new SignInError(String(body["error_description"] ?? body["error"] ?? response.status));
  const access = String(body["access_token"]);
  const claims = claimsOf(access);
  const text = (body["scope"] ?? claims["scope"] ?? claims["scp"] ?? "") as string | string[];
  return {
    access, ends: Date.now() + 1000 * Number(body["expires_in"] ?? 300), scopes: typeof text === "string" ? text.split(" ") : text,
    user: String(claims["sub"] ?? ""),
    ...(typeof body["refresh_token"] === "string" ? { refresh: body["refresh_token"] } : form["refresh_token"] ? { refresh: form["refresh_token"] } : {}),
    ...(typeof body["id_token"] === "string" ? { id: body["id_token"] } : {}),
  };
}

/** Claims of a token, for what to show; what the token is worth the hub decides. */
export function claimsOf(token: string): Record<string, unknown> {
  try {
    const text = token.split(".")[1]!.replace(/-/g, "+").replace(/_/g, "/");
    return JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)))) as Record<string, unknown>;
  } catch {
    return {};
  }
}

function keep(tokens: Tokens): void {
  localStorage.setItem(tokensKey, JSON.stringify(tokens));
}

function read<T>(key: string): T | undefined {
  try {
    return (JSON.parse(localStorage.getItem(key) ?? "null") as T | null) ?? undefined;
  } catch {
    return undefined;
  }
}

function random(): string {
  return base64url(crypto.getRandomValues(new Uint8Array(24)));
}

function base64url(bytes: Uint8Array): string {
  return btoa(String.fromCharCode(...bytes)).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
}

/** SHA-256; browsers have it on https and on loopback only, and the hub is on nothing else. */
async function sha256(bytes: Uint8Array<ArrayBuffer>): Promise<Uint8Array> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
}
