/**
 * A typed client of a coaphub: every path, parameter, body and answer of its OpenAPI document, through openapi-fetch; and what
 * such a document has no words for: lists that come as lines in pages, and events that come back after a break.
 */
import createClient, { type Client } from "openapi-fetch";
import type { components, paths } from "./schema.js";

export type { components, operations, paths } from "./schema.js";

type Schemas = components["schemas"];
export type Device = Schemas["Device"];
export type Resource = Schemas["Resource"];
export type Event = Schemas["Event"];
/** One message of a subscription. `resumeToken` is where to go on behind it. */
export type Told = Schemas["Told"];
type Status = Schemas["Status"];

/**
 * An access token, or what gives one; that is asked before each request, and once more with `refused` when the hub refused the
 * token it gave: for another one.
 */
export type Token = string | ((refused: boolean) => string | Promise<string>);

/** What the hub refused. `code` is stable (docs/errors.md); `status` is that of HTTP, 0 for a failure in the middle of a list. */
export class HubError extends Error {
  constructor(readonly status: number, readonly code: string, message: string, readonly details: Status["details"] = []) {
    super(message);
    this.name = "HubError";
  }

  /** @internal */
  static of(status: number, body: unknown): HubError {
    const s = body as Partial<Status> | null;
    if (!s || typeof s.message !== "string") return new HubError(status, "hub-refused", `the answer was ${status}`);
    const details = s.details ?? [];
    const info = details.find((d): d is Extract<typeof d, { reason: string }> => "reason" in d);
    return new HubError(status, info?.reason ?? "hub-refused", s.message, details);
  }
}

type Answer<P extends keyof paths> = paths[P] extends { get: { responses: { 200: { content: { "application/json": infer Body } } } } } ? Body : never;
type ElementOf<P extends keyof paths> = Answer<P> extends infer Line ? (Line extends { result: infer E } ? E : never) : never;

/** The paths that answer with a list. */
export type Lists = { [P in keyof paths]: [ElementOf<P>] extends [never] ? never : P }[keyof paths];

/** What an element of a list is. */
export type Element<P extends Lists> = Omit<ElementOf<P>, "cursor">;

type ParametersOf<P extends keyof paths> = paths[P] extends { get: { parameters: infer Q } } ? Omit<Q, "header" | "cookie"> : never;

export type EventQuery = NonNullable<paths["/api/v1/events/stream"]["get"]["parameters"]["query"]>;

export interface WatchOptions {
  /** Ends the subscription, with the signal's reason. */
  signal?: AbortSignal;
  /** Is told each time that the connection was lost and `watch` comes back. */
  broken?: (error: unknown) => void;
}

const pageSize = 200;
const silence = 35_000; // the hub sends something every ten seconds
const firstPause = 500;
const longestPause = 30_000;

export class Hub {
  /** Every call of the API, typed. An answer of 400 and above rejects with a HubError. */
  readonly api: Client<paths>;
  readonly #server: string;
  readonly #token: (refused?: boolean) => Promise<string>;

  /** @param server base URL of the hub's HTTP API, such as https://hub.example:8080 */
  constructor(server: string, token: Token) {
    this.#server = server.replace(/\/+$/, "");
    this.#token = async (refused = false) => (typeof token === "function" ? token(refused) : token);
    this.api = createClient<paths>({ baseUrl: this.#server });
    const copies = new WeakMap<Request, Request>();
    this.api.use({
      onRequest: async ({ request }) => {
        request.headers.set("Authorization", `Bearer ${await this.#token()}`);
        if (typeof token === "function") copies.set(request, request.clone());
        return request;
      },
      onResponse: async ({ request, response: first }) => {
        let response = first;
        const copy = copies.get(request);
        if (response.status === 401 && copy) { // the hub did nothing: it may be asked again
          copy.headers.set("Authorization", `Bearer ${await this.#token(true)}`);
          response = await fetch(copy);
        }
        if (response.status >= 400) throw HubError.of(response.status, await response.json().catch(() => null));
        return response;
      },
    });
  }

  /** Reads a list, page by page: each page is read whole before its first element is given. */
  async *list<P extends Lists>(path: P, parameters?: ParametersOf<P>): AsyncGenerator<Element<P>, void, undefined> {
    const given = (parameters ?? {}) as { query?: Record<string, unknown> };
    for (let cursor: string | undefined; ; ) {
      const query = { limit: pageSize, ...given.query, ...(cursor ? { cursor } : {}) };
      const page = await this.page(path, { ...given, query } as unknown as ParametersOf<P>);
      yield* page.elements;
      if (page.error) throw page.error;
      cursor = page.cursor;
      if (!cursor || given.query?.["limit"]) return; // whoever asks for so many gets so many
    }
  }

  /**
   * Reads one page of a list: what `query.limit` and `query.cursor` say, the whole list without. `cursor` is where the next page
   * begins, absent behind the last; `error` is what broke the list off behind these elements.
   */
  async page<P extends Lists>(path: P, parameters?: ParametersOf<P>): Promise<{ elements: Element<P>[]; cursor?: string; error?: HubError }> {
    const get = this.api.GET as unknown as (path: string, init: object) => Promise<{ response: Response; data?: ReadableStream<Uint8Array> }>;
    const { data } = await get(path, { params: parameters ?? {}, parseAs: "stream" });
    const elements: (Element<P> & { cursor?: string })[] = [];
    for await (const line of data ? lines(data) : []) {
      if (line.trim() === "") continue;
      const { result, error } = JSON.parse(line) as { result?: Element<P>; error?: Status };
      if (error) return { elements, error: HubError.of(0, error) };
      elements.push(result as Element<P>);
    }
    const last = elements.at(-1);
    const cursor = last?.cursor;
    delete last?.cursor;
    return { elements, ...(cursor ? { cursor } : {}) };
  }

  /**
   * Hears events as they happen, and comes back after a break behind the last one: nothing is lost for as long as the hub keeps
   * its history. The first message has `operationProcessed`; one with `lagged` says that something was lost and that the
   * current state follows. To go on in a later run, keep `resumeToken` and give it as `query.resumeToken`.
   */
  async *watch(query: EventQuery = {}, options: WatchOptions = {}): AsyncGenerator<Told, void, undefined> {
    let last = query.resumeToken;
    let pause = firstPause;
    for (let met = false, told = false; ; ) {
      options.signal?.throwIfAborted();
      const quiet = new AbortController();
      const end = () => quiet.abort(options.signal?.reason);
      options.signal?.addEventListener("abort", end);
      let timer: ReturnType<typeof setTimeout> | undefined;
      try {
        const { resumeToken: _, ...filter } = query;
        const asked = new URLSearchParams();
        for (const [name, value] of Object.entries(filter)) for (const one of [value].flat()) asked.append(name, String(one));
        const headers: Record<string, string> = { Accept: "text/event-stream", Authorization: `Bearer ${await this.#token()}` };
        if (last) headers["Last-Event-ID"] = last;
        const response = await fetch(`${this.#server}/api/v1/events/stream?${asked}`, { headers, signal: quiet.signal });
        if (!response.ok) throw HubError.of(response.status, await response.json().catch(() => null));
        met = true;
        let data = "";
        let id = "";
        const alive = () => {
          clearTimeout(timer);
          timer = setTimeout(() => quiet.abort(new Error("the hub fell silent")), silence);
        };
        alive();
        for await (const line of lines(response.body ?? new ReadableStream())) {
          alive();
          if (line.startsWith("id:")) id = line.slice(3).trim();
          else if (line.startsWith("data:")) data = line.slice(5); // one line: JSON has no line breaks
          else if (line === "" && data !== "") {
            const { result, error } = JSON.parse(data) as { result?: Told; error?: Status };
            if (error) throw HubError.of(error.code === 16 ? 401 : error.code === 14 ? 503 : error.code === 8 ? 429 : 0, error);
            data = "";
            clearTimeout(timer); // the loop may take its time
            const again = told;
            last = id;
            pause = firstPause;
            told = true;
            if (result && !(again && result.operationProcessed && !result.operationProcessed.lagged)) yield result;
            alive();
          }
        }
        throw new Error("the hub broke off");
      } catch (error) {
        options.signal?.throwIfAborted();
        // A token that ended is asked for anew; one that is refused at once has no better one behind it.
        const passing = !(error instanceof HubError) || error.status === 503 || error.status === 429 || (error.status === 401 && pause === firstPause && told);
        if (!met || !passing) throw error;
        options.broken?.(error);
      } finally {
        clearTimeout(timer);
        options.signal?.removeEventListener("abort", end);
        quiet.abort();
      }
      await new Promise<void>((resolve) => {
        const wake = () => {
          clearTimeout(wait);
          options.signal?.removeEventListener("abort", wake);
          resolve();
        };
        const wait = setTimeout(wake, pause);
        options.signal?.addEventListener("abort", wake);
      });
      pause = Math.min(2 * pause, longestPause);
    }
  }
}

/** The lines of a body; what is behind the last line feed was cut off, unless the body ended there in order. */
async function* lines(body: ReadableStream<Uint8Array>): AsyncGenerator<string, void, undefined> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      rest += decoder.decode(value, { stream: true });
      const parts = rest.split("\n");
      rest = parts.pop() ?? "";
      yield* parts;
    }
    if (rest !== "") yield rest;
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}
