import { beforeEach, afterEach, describe, expect, test, vi } from "vitest";
import type { Told } from "@coaphub/client";
import { Live, type Socket } from "./live";

/** A socket whose other end is the test. */
class Fake implements Socket {
  static all: Fake[] = [];
  sent: { createSubscription?: Record<string, unknown>; cancelSubscription?: { subscriptionId: string }; correlationId?: string }[] = [];
  onopen: Socket["onopen"] = null;
  onmessage: Socket["onmessage"] = null;
  onclose: Socket["onclose"] = null;
  constructor(readonly token: string) {
    Fake.all.push(this);
  }
  send(text: string): void {
    this.sent.push(JSON.parse(text) as Fake["sent"][number]);
  }
  close(): void {
    this.end(1000);
  }
  open(): void {
    this.onopen?.call(this as unknown as WebSocket, undefined as never);
  }
  says(result: Partial<Told>): void {
    this.onmessage?.call(this as unknown as WebSocket, { data: JSON.stringify({ result }) } as MessageEvent);
  }
  end(code: number): void {
    this.onclose?.call(this as unknown as WebSocket, { code } as CloseEvent);
  }
}

const settle = () => vi.advanceTimersByTimeAsync(0);

describe("live", () => {
  let asked: boolean[];
  let live: Live;
  beforeEach(() => {
    vi.useFakeTimers();
    Fake.all = [];
    asked = [];
    live = new Live((token) => new Fake(token), (refused) => {
      asked.push(refused);
      return Promise.resolve(refused ? "fresh" : "token");
    });
  });
  afterEach(() => void vi.useRealTimers());

  test("goes on behind the last event after a break", async () => {
    const told: string[] = [];
    let lives = 0;
    live.subscribe({ eventFilter: ["RESOURCE_CHANGED"] }, { told: (e) => told.push(e.resumeToken ?? ""), live: () => lives++ });
    await settle();
    const [first] = Fake.all;
    first!.open();
    expect(first!.sent).toEqual([{ createSubscription: { eventFilter: ["RESOURCE_CHANGED"] }, correlationId: "1" }]);
    first!.says({ correlationId: "1", subscriptionId: "s", resumeToken: "a", operationProcessed: { errorStatus: { code: "OK", message: "" } } });
    first!.says({ correlationId: "1", subscriptionId: "s", resumeToken: "b", resourceChanged: {} as never });
    expect([told, lives, live.link]).toEqual([["b"], 1, "live"]);
    first!.end(1006);
    expect(live.link).toBe("lost");
    await vi.advanceTimersByTimeAsync(1000);
    const second = Fake.all[1]!;
    second.open();
    expect(second.sent[0]!.createSubscription).toEqual({ eventFilter: ["RESOURCE_CHANGED"], resumeToken: "b" });
    expect(live.link).toBe("live");
  });

  test("takes another token when the hub refused the one it had", async () => {
    live.subscribe({}, { told: () => undefined });
    await settle();
    Fake.all[0]!.open();
    Fake.all[0]!.end(1008);
    expect(live.link).toBe("live"); // nothing is lost yet
    await vi.advanceTimersByTimeAsync(1000);
    expect(asked).toEqual([false, true]);
    expect(Fake.all[1]!.token).toBe("fresh");
  });

  test("waits longer each time nobody answers", async () => {
    live.subscribe({}, { told: () => undefined });
    await settle();
    for (let ended = 0, i = 0; i < 600; i++) {
      for (; ended < Fake.all.length; ended++) Fake.all[ended]!.end(1006);
      await vi.advanceTimersByTimeAsync(100);
    }
    expect(Fake.all.length).toBeGreaterThan(7); // in a minute
    expect(Fake.all.length).toBeLessThan(20);
  });

  test("a subscription that ended is cancelled, also before it was answered", async () => {
    const end = live.subscribe({}, { told: () => undefined });
    await settle();
    const s = Fake.all[0]!;
    s.open();
    end();
    s.says({ correlationId: "1", subscriptionId: "late", operationProcessed: { errorStatus: { code: "OK", message: "" } } });
    expect(s.sent.at(-1)).toEqual({ cancelSubscription: { subscriptionId: "late" } });
  });

  test("what is refused says why", async () => {
    const refused = vi.fn();
    live.subscribe({}, { told: () => undefined, refused });
    await settle();
    Fake.all[0]!.open();
    Fake.all[0]!.says({ correlationId: "1", operationProcessed: { errorStatus: { code: "ERROR", message: "no" } } });
    expect(refused).toHaveBeenCalledWith("no");
  });
});
