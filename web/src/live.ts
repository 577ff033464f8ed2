/**
 * What happens, as it happens: one WebSocket a tab carries all subscriptions of its pages. After a break each goes on behind
 * the last event it heard (its resume token), so nothing is missed and nothing comes twice; where the hub no longer has what
 * was missed, it says so (`lagged`) and the current state follows.
 */
import type { Told } from "@coaphub/client";

export interface Filter {
  eventFilter?: string[];
  deviceIdFilter?: string[];
  hrefFilter?: string[];
  resourceIdFilter?: string[];
  includeCurrentState?: boolean;
  resumeToken?: string;
}

export interface Subscription {
  /** Each event, in order. */
  told: (event: Told) => void;
  /** From here on events are live: at first, and again after each break. lagged: some were missed and the state was sent. */
  live?: (lagged: boolean) => void;
  refused?: (message: string) => void;
  /** Each place the subscription gets to, also where nothing happened: to go on from there later. */
  place?: (resumeToken: string) => void;
}

export type Link = "connecting" | "live" | "lost";

interface Kept {
  filter: Filter;
  sub: Subscription;
  id: string | undefined;
  resume: string | undefined;
}

/** What is needed of a WebSocket. */
export type Socket = Pick<WebSocket, "send" | "close" | "onopen" | "onmessage" | "onclose">;

const firstPause = 250;
const longestPause = 10_000;

export class Live {
  readonly #open: (token: string) => Socket;
  readonly #token: (refused: boolean) => Promise<string>;
  readonly #subs = new Map<string, Kept>();
  readonly #heard = new Set<() => void>();
  #socket: Socket | undefined;
  #ready = false;
  #next = 1;
  #pause = firstPause;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #link: Link = "connecting";
  #refused = false;
  #dialling = false;

  constructor(open: (token: string) => Socket, token: (refused: boolean) => Promise<string>) {
    this.#open = open;
    this.#token = token;
  }

  get link(): Link {
    return this.#link;
  }

  listen = (f: () => void): (() => void) => {
    this.#heard.add(f);
    return () => this.#heard.delete(f);
  };

  /** Subscribes; returns what ends it. */
  subscribe(filter: Filter, sub: Subscription): () => void {
    const correlation = String(this.#next++);
    const kept: Kept = { filter, sub, id: undefined, resume: filter.resumeToken };
    this.#subs.set(correlation, kept);
    if (this.#ready) this.#ask(correlation, kept);
    else this.#dial();
    return () => {
      this.#subs.delete(correlation);
      if (this.#ready && kept.id) this.#socket?.send(JSON.stringify({ cancelSubscription: { subscriptionId: kept.id } }));
    };
  }

  close(): void {
    clearTimeout(this.#timer);
    this.#subs.clear();
    this.#socket?.close();
  }

  #ask(correlationId: string, { filter, resume }: Kept): void {
    const { resumeToken: _, ...rest } = filter;
    this.#socket?.send(JSON.stringify({ createSubscription: { ...rest, ...(resume ? { resumeToken: resume } : {}) }, correlationId }));
  }

  #dial(): void {
    if (this.#socket || this.#dialling) return;
    this.#dialling = true;
    void this.#token(this.#refused).then((token) => {
      this.#dialling = false;
      this.#refused = false;
      const socket = this.#open(token);
      this.#socket = socket;
      socket.onopen = () => {
        this.#ready = true;
        this.#pause = firstPause;
        for (const [correlation, kept] of this.#subs) this.#ask(correlation, kept);
        this.#to("live");
      };
      socket.onmessage = ({ data }) => this.#message(data as string);
      socket.onclose = ({ code }) => {
        // 1008: the token ended, or is refused (RFC 6455, Section 7.4.1); before it was open nobody says why.
        this.#refused = code === 1008 || !this.#ready;
        this.#socket = undefined;
        this.#ready = false;
        for (const kept of this.#subs.values()) kept.id = undefined;
        if (code !== 1008) this.#to("lost");
        clearTimeout(this.#timer);
        this.#timer = setTimeout(() => this.#dial(), this.#pause * (0.75 + Math.random() / 2));
        this.#pause = Math.min(2 * this.#pause, longestPause);
      };
    });
  }

  #message(data: string): void {
    const { result } = JSON.parse(data) as { result?: Told };
    if (!result) return; // an error frame: the close that follows says what to do
    const correlation = result.correlationId ?? "";
    const kept = this.#subs.get(correlation);
    if (!kept) {
      if (result.operationProcessed && result.subscriptionId && correlation !== "") // ended before it was answered
        this.#socket?.send(JSON.stringify({ cancelSubscription: { subscriptionId: result.subscriptionId } }));
      return;
    }
    if (result.subscriptionId) kept.id = result.subscriptionId;
    if (result.resumeToken) {
      kept.resume = result.resumeToken;
      kept.sub.place?.(result.resumeToken);
    }
    if (result.operationProcessed) {
      const { errorStatus, lagged } = result.operationProcessed;
      if (errorStatus && errorStatus.code !== "OK") kept.sub.refused?.(errorStatus.message ?? errorStatus.code ?? "");
      else kept.sub.live?.(lagged ?? false);
      return;
    }
    if (result.subscriptionCanceled) {
      kept.id = undefined;
      if (this.#ready) this.#ask(correlation, kept);
      return;
    }
    kept.sub.told(result);
  }

  #to(link: Link): void {
    if (this.#link === link) return;
    this.#link = link;
    for (const f of this.#heard) f();
  }
}
