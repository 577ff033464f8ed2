/** A hub, devices and a browser for tests of the console. */
import { spawn, spawnSync, type ChildProcess } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium, type Browser, type BrowserContext, type BrowserContextOptions, type Page } from "playwright-core";

export const program = process.env["COAPHUB_PROGRAM"] ?? "";
export const night = process.env["COAPHUB_DOSE"] === "night";
export const password = "correct horse battery staple";

/** A port of the loopback that nobody has now. */
async function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const s = createServer();
    s.once("error", reject);
    s.listen(0, "127.0.0.1", () => {
      const { port } = s.address() as { port: number };
      s.close(() => resolve(port));
    });
  });
}

export class World {
  readonly data = mkdtempSync(join(tmpdir(), "coaphub-console-"));
  readonly ports: number[] = [];
  browser!: Browser;
  #hub: ChildProcess | undefined;
  #others: ChildProcess[] = [];
  #env: Record<string, string>;

  constructor(env: Record<string, string> = {}) {
    this.#env = env;
  }

  get url(): string {
    return `http://127.0.0.1:${this.ports[1]}`;
  }

  async start(): Promise<void> {
    for (let i = 0; i < 6; i++) this.ports.push(await freePort());
    this.browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu"] });
    await this.startHub();
    this.run(["user", "passwd", "admin", "--password-stdin"], password);
  }

  async startHub(): Promise<void> {
    const at = (i: number) => `127.0.0.1:${this.ports[i]}`;
    const hub = spawn(
      program,
      ["serve", "--data", this.data, "--external-address", "127.0.0.1", "--coap-address", at(0), "--http-address", at(1), "--admin-address", at(2), "--grpc-address", at(3)],
      { env: { ...process.env, COAPHUB_ENROLMENTGATEWAY_API_COAP_ADDRESS: at(4), COAPHUB_ENROLMENTGATEWAY_API_HTTP_ADDRESS: at(5), ...this.#env }, stdio: ["ignore", "pipe", "pipe"] },
    );
    this.#hub = hub;
    let said = "";
    await new Promise<void>((resolve, reject) => {
      const hear = (b: Buffer) => {
        said += String(b);
        if (/^ready /m.test(said)) resolve();
      };
      hub.stdout.on("data", hear);
      hub.stderr.on("data", hear);
      hub.once("exit", (code) => reject(new Error(`the hub ended with ${code}: ${said}`)));
    });
  }

  async stopHub(): Promise<void> {
    await ended(this.#hub, "SIGTERM");
    this.#hub = undefined;
  }

  /** Runs a command of the hub's program to its end. */
  run(args: string[], input = ""): string {
    const r = spawnSync(program, [...args, "--data", this.data], { input, encoding: "utf8" });
    if (r.status !== 0) throw new Error(`coaphub ${args.join(" ")}: ${r.stderr}`);
    return r.stdout.trim();
  }

  /** Starts a command that goes on until the end, or until it is told to end. */
  begin(args: string[]): () => Promise<void> {
    const p = spawn(program, [...args, "--data", this.data], { stdio: "ignore" });
    this.#others.push(p);
    return () => ended(p, "SIGTERM");
  }

  /** Simulated devices; resolves when all of them are online. */
  async devices(n: number, ...args: string[]): Promise<() => Promise<void>> {
    const before = this.status().online;
    const stop = this.begin(["simulate", "--devices", String(n), ...args]);
    await until(() => this.status().online >= before + n, 100_000, () => `${this.status().online} of ${before + n} devices are online`);
    return stop;
  }

  status(): { devices: number; online: number } {
    return JSON.parse(this.run(["status", "--json"])) as { devices: number; online: number };
  }

  /** A call of the API as the administrator. */
  async call(method: string, path: string, body?: unknown): Promise<unknown> {
    this.#token ??= this.run(["token", "--ttl", "24h"]);
    const r = await fetch(this.url + path, {
      method, headers: { Authorization: `Bearer ${this.#token}`, "Content-Type": "application/json" }, ...(body === undefined ? {} : { body: JSON.stringify(body) }),
    });
    const text = await r.text();
    if (!r.ok) throw new Error(`${method} ${path}: ${r.status} ${text}`);
    return text === "" ? undefined : text.includes("\n{") ? text.trim().split("\n").map((l) => JSON.parse(l) as unknown) : (JSON.parse(text) as unknown);
  }
  #token: string | undefined;

  /** IDs of the devices that the list has. */
  async ids(): Promise<string[]> {
    const lines = (await this.call("GET", "/api/v1/devices?limit=1000")) as { result: { id: string } }[] | { result: { id: string } };
    return [lines].flat().map((l) => l.result.id);
  }

  /** A browser of somebody who is not signed in. What goes wrong on its pages is in `complaints`. */
  async visitor(options: BrowserContextOptions = {}): Promise<Visitor> {
    return new Visitor(this, await this.browser.newContext({ viewport: { width: 1280, height: 800 }, permissions: ["clipboard-read", "clipboard-write"], ...options }));
  }

  async end(): Promise<void> {
    await this.browser?.close();
    for (const p of this.#others) await ended(p, "SIGTERM");
    if (this.#hub) await this.stopHub();
    rmSync(this.data, { recursive: true, force: true });
  }
}

export class Visitor {
  readonly complaints: string[] = [];
  constructor(readonly world: World, readonly context: BrowserContext) {
    context.on("page", (page) => this.#watch(page));
  }

  #watch(page: Page): void {
    page.on("pageerror", (e) => this.complaints.push(e.message));
    page.on("console", (m) => {
      // What the hub or the provider refuses, or a hub that is away, is what the tests of that want.
      if (m.type() === "error" && !/ERR_CONNECTION_REFUSED|WebSocket connection|ERR_INCOMPLETE|status of (400|401|404|503)/.test(m.text())) this.complaints.push(m.text());
    });
    page.on("request", (r) => {
      if (!r.url().startsWith(this.world.url) && !/^(blob|data|about):/.test(r.url())) this.complaints.push(`asks ${r.url()}`);
    });
  }

  /** Opens a page of the console, and signs in where it is asked to. */
  async open(path = "/"): Promise<Page> {
    const page = await this.context.newPage();
    await page.goto(this.world.url + path);
    await this.signIn(page);
    return page;
  }

  async signIn(page: Page): Promise<void> {
    await page.waitForSelector("h1, input[type=password]");
    const field = page.locator("input[type=password]");
    if ((await field.count()) === 0) return;
    await page.locator("input[name=username], input[autocomplete=username]").first().fill("admin");
    await field.fill(password);
    await page.locator("button[type=submit]").click();
    await page.waitForSelector("main h1");
  }

  async end(): Promise<void> {
    await this.context.close();
  }
}

export async function until(is: () => boolean | Promise<boolean>, within: number, what: () => string): Promise<void> {
  for (const by = Date.now() + within; ; ) {
    if (await is()) return;
    if (Date.now() > by) throw new Error(`waited in vain: ${what()}`);
    await new Promise((r) => setTimeout(r, 50));
  }
}

async function ended(p: ChildProcess | undefined, signal: NodeJS.Signals): Promise<void> {
  if (!p || p.exitCode !== null || p.signalCode !== null) return;
  const gone = new Promise<void>((r) => p.once("exit", () => r()));
  p.kill(signal);
  const hard = setTimeout(() => p.kill("SIGKILL"), 10_000);
  await gone;
  clearTimeout(hard);
}
