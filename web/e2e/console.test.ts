import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import type { Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { texts } from "../src/texts";
import { night, password, program, until, World, type Visitor } from "./world";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const t = texts;

let w: World;
let visitor: Visitor;

beforeAll(async () => {
  expect(program, "COAPHUB_PROGRAM is the hub's program").not.toBe("");
  w = new World();
  await w.start();
  await w.devices(5, "--rate", "2");
  visitor = await w.visitor();
});

afterAll(async () => {
  await w.end();
});

/** What axe finds against WCAG 2.1 AA. */
async function violations(page: Page): Promise<string[]> {
  // The page's policy lets no script in; the test's comes over the debugger.
  await page.evaluate(axe);
  return page.evaluate(async () => {
    const { violations } = await (window as unknown as { axe: { run: (o: object) => Promise<{ violations: { id: string; nodes: { html: string; failureSummary: string }[] }[] }> } }).axe.run({
      runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"],
    });
    return violations.map((v) => `${v.id}: ${v.nodes.map((n) => `${n.html.slice(0, 150)} ${n.failureSummary}`).join("; ")}`);
  });
}

describe("signing in", () => {
  test("a person signs in, sees the devices, and signs out", async () => {
    const v = await w.visitor();
    const page = await v.open();
    await page.getByRole("heading", { name: t.devices.title }).waitFor();
    await until(async () => (await page.getByRole("row").count()) === 6, 10_000, () => "five devices in the list");
    expect(new URL(page.url()).search).toBe(""); // neither code nor state stay in the address
    await page.getByRole("button", { name: `${t.account.signedInAs} admin` }).click();
    await page.getByRole("menuitem", { name: t.account.signOut }).click();
    await page.waitForURL((u) => u.pathname !== "/" || u.search !== "");
    await page.goto(w.url + "/");
    await page.waitForSelector("input[type=password]"); // the provider's session ended, too
    expect(v.complaints).toEqual([]);
    await v.end();
  });

  test("the first view is small", async () => {
    const v = await w.visitor();
    const sizes = new Map<string, number>(); // the page is left for signing in, and what it had is in the browser's cache then
    v.context.on("response", (r) => {
      const { pathname } = new URL(r.url());
      if (pathname.startsWith("/console/") || pathname === "/") sizes.set(pathname, Number(r.headers()["content-length"] ?? 0));
    });
    const page = await v.open();
    await page.getByRole("link", { name: /simulated/ }).first().waitFor();
    const bytes = [...sizes.values()].reduce((a, b) => a + b, 0);
    expect(bytes).toBeGreaterThan(50_000);
    expect(bytes).toBeLessThan(350_000); // compressed
    await v.end();
  });

  test("a viewer is not offered what he may not do", async () => {
    w.run(["user", "add", "visitor", "--role", "viewer", "--password-stdin"], password);
    const v = await w.visitor();
    const page = await v.context.newPage();
    await page.goto(w.url + "/");
    await page.locator("input[name=username], input[autocomplete=username]").first().fill("visitor");
    await page.locator("input[type=password]").fill(password);
    await page.locator("button[type=submit]").click();
    await page.getByText(t.devices.empty).waitFor();
    expect(await page.getByRole("link", { name: t.nav.add }).count()).toBe(0);
    await page.goto(w.url + "/system");
    await page.getByRole("tab", { name: t.system.links }).waitFor();
    expect(await page.getByRole("tab", { name: t.system.configuration }).count()).toBe(0);
    await v.end();
  });

  test("the session ends in the middle of a form: signed in again, the input is kept", async () => {
    const v = await w.visitor();
    const page = await v.open("/add");
    const id = page.getByLabel(t.add.id);
    const mine = "d0000000-0000-4000-8000-00000000c0de";
    await id.fill(mine);
    w.run(["user", "passwd", "admin", "--password-stdin"], password); // which ends all that the account had
    await page.getByText(t.account.expired).waitFor({ timeout: 30_000 });
    const [window] = await Promise.all([v.context.waitForEvent("page"), page.getByRole("button", { name: t.account.again }).click()]);
    await window.waitForSelector("input[type=password]");
    await window.locator("input[name=username], input[autocomplete=username]").first().fill("admin");
    await window.locator("input[type=password]").fill(password);
    const closed = window.waitForEvent("close");
    await window.locator("button[type=submit]").click();
    await closed;
    await page.getByText(t.account.expired).waitFor({ state: "detached" });
    expect(await id.inputValue()).toBe(mine);
    await page.getByRole("button", { name: t.add.make, exact: true }).click();
    await page.getByText(t.add.steps["waiting"]!).waitFor();
    expect(v.complaints).toEqual([]);
    await v.end();
  });
});

describe("devices", () => {
  test("presence is live, and filters and search find", async () => {
    const page = await visitor.open();
    await page.getByRole("link", { name: /simulated/ }).first().waitFor();
    const [id] = await w.ids();
    await page.getByLabel(t.devices.search).fill(id!);
    await until(async () => (await page.getByRole("row").count()) === 2, 5_000, () => "one device that matches");
    await page.getByLabel(t.devices.search).fill("nobody is called so");
    await page.getByText(t.devices.nothing).waitFor();
    await page.getByRole("button", { name: t.devices.clear }).click();
    const more = await w.devices(1, "--seed", "another");
    await until(async () => (await page.getByRole("row").count()) === 7, 10_000, () => "a sixth device");
    await more();
    await page.getByLabel(t.devices.state, { exact: true }).selectOption("offline");
    await until(async () => (await page.getByRole("row").count()) === 2, 10_000, () => "one that went");
    const name = await page.getByRole("link", { name: /simulated/ }).innerText();
    await page.getByRole("row", { name }).locator(".box").click();
    await page.getByRole("button", { name: t.devices.delete, exact: true }).click();
    await page.getByRole("dialog").getByRole("textbox").fill("1");
    await page.getByRole("dialog").getByRole("button", { name: t.devices.delete }).click();
    await page.getByText(t.devices.nothing).waitFor();
    expect((await w.ids()).length).toBe(5);
    expect(visitor.complaints).toEqual([]);
    await page.close();
  });

  test("hostile texts are texts", async () => {
    const [id] = await w.ids();
    const bad = `<img src=x onerror="document.title='run'">`;
    await w.call("PATCH", `/api/v1/devices/${id}/labels`, { labels: { evil: bad } });
    const page = await visitor.open(`/?q=${id}`);
    await page.getByRole("button", { name: t.devices.columns }).click();
    await page.getByRole("checkbox", { name: t.devices.labels }).check();
    await page.keyboard.press("Escape");
    await page.getByRole("cell", { name: `evil=${bad}` }).waitFor();
    expect(await page.title()).toBe("coaphub");
    await w.call("PATCH", `/api/v1/devices/${id}/labels`, { labels: { evil: null } });
    expect(visitor.complaints).toEqual([]);
    await page.close();
  });

  test("many devices are scrolled smoothly", { timeout: 300_000 }, async () => {
    const n = night ? 10_000 : 1_000;
    const many = new World();
    await many.start();
    await many.devices(n, "--seed", "many", "--start-rate", "400", "--rate", "50");
    const v = await many.visitor();
    const page = await v.open();
    await page.getByText(t.devices.of(n.toLocaleString("en-US"), n.toLocaleString("en-US"))).waitFor({ timeout: 60_000 });
    // Scrolled from top to bottom in a hundred steps. A step takes from the place that is set until a frame with it was painted; the
    // machine may have other work, so the median counts.
    const { shown, took } = await page.evaluate(async () => {
      const el = document.querySelector(".scroll")!;
      const step = (el.scrollHeight - el.clientHeight) / 100;
      const took: number[] = [];
      let shown = 0;
      for (let i = 0; i <= 100; i++) {
        const begun = performance.now();
        el.scrollTop = i * step;
        await new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)));
        took.push(performance.now() - begun);
        if (el.querySelectorAll("tbody a").length > 5) shown++;
      }
      return { shown, took: took.sort((a, b) => a - b) };
    });
    expect(shown).toBe(101); // no step is blank
    expect(took[50]!, `${took.map((t) => t.toFixed(0)).join(" ")} ms`).toBeLessThan(100);
    expect(await page.locator("tbody tr").count()).toBeLessThan(80); // of which only those in sight are there
    expect(v.complaints).toEqual([]);
    await many.end();
  });
});

describe("onboarding", () => {
  test("a device is added and arrives live", async () => {
    const page = await visitor.open("/add");
    await page.getByLabel(t.add.proof).selectOption("key");
    await page.getByRole("button", { name: t.add.make, exact: true }).click();
    await page.getByText(t.add.steps["waiting"]!).waitFor();
    await page.getByRole("img", { name: t.add.qr }).waitFor();
    const line = await page.getByRole("tabpanel").locator("pre").innerText();
    expect(line).toMatch(/^coaphub simulate --device-id /);
    const stop = w.begin(line.split(" ").slice(1));
    await page.getByRole("heading", { name: t.add.steps["published"]! }).waitFor({ timeout: 20_000 });
    await page.getByRole("link", { name: t.add.look }).click();
    await page.waitForURL(/\/devices\//);
    await stop();
    expect(visitor.complaints).toEqual([]);
    await page.close();
  });

  test("a device that is refused: why", async () => {
    const page = await visitor.open("/add");
    await page.getByLabel(t.add.proof).selectOption("key");
    await page.getByRole("button", { name: t.add.make, exact: true }).click();
    const line = (await page.getByRole("tabpanel").locator("pre").innerText()).split(" ").slice(1);
    line[line.indexOf("--code") + 1] = "not-the-code-that-was-made";
    const stop = w.begin(line);
    await page.getByRole("heading", { name: t.add.refused }).waitFor({ timeout: 20_000 });
    await page.getByText(/code-refused/).first().waitFor();
    await stop();
    await page.close();
  });
});

describe("one device", () => {
  const light = "/light/1";
  /** The twin of the light as a person sees it. */
  const value = (page: Page) => page.getByRole("region", { name: light });
  let id: string;
  let stop: () => Promise<void>;
  beforeAll(async () => {
    const before = new Set(await w.ids());
    stop = await w.devices(1, "--seed", "quiet", "--rate", "0.0001"); // it says nothing by itself
    id = (await w.ids()).find((d) => !before.has(d))!;
    await w.call("PUT", `/api/v1/devices/${id}/resources${light}`, { power: 10 });
  });
  afterAll(() => stop());
  const at = (tab: string) => `/devices/${id}?tab=${tab}&href=${encodeURIComponent(light)}`;

  test("a value that changes is seen within 300 ms", async () => {
    const page = await visitor.open(at("resources"));
    await value(page).getByText("power").first().waitFor();
    // From the moment that the caller of the API has the device's answer to the text on the page, by the browser's clock.
    const took: number[] = [];
    for (let power = 20; power < 40; power++) {
      const seen = page.evaluate(
        ([power]) =>
          new Promise<number>((resolve) => {
            const there = () => [...document.querySelectorAll("section.resource *")].some((e) => e.children.length === 0 && e.textContent === String(power));
            const look = () => there() && (watch.disconnect(), resolve(Date.now()));
            const watch = new MutationObserver(look);
            watch.observe(document.body, { subtree: true, childList: true, characterData: true });
            look();
          }),
        [power],
      );
      await w.call("PUT", `/api/v1/devices/${id}/resources${light}`, { power });
      const answered = Date.now();
      took.push((await seen) - answered);
    }
    took.sort((a, b) => a - b);
    expect(took[took.length / 2]!, `${took.join(" ")} ms`).toBeLessThan(300);
    expect(visitor.complaints).toEqual([]);
    await page.close();
  });

  test("a command goes to the device, and its answer is shown", async () => {
    const page = await visitor.open(at("resources"));
    const area = value(page);
    const power = area.getByLabel("power", { exact: true }).last();
    await power.fill("77");
    await area.getByRole("button", { name: t.device.resource.send, exact: true }).click();
    await area.getByText(t.device.order.answered).waitFor();
    await until(async () => JSON.stringify(await w.call("GET", `/api/v1/devices/${id}/resources${light}`)).includes('"power":77'), 5_000, () => "the twin to follow");
    expect(visitor.complaints).toEqual([]);
    await page.close();
  });

  test("history is a chart, and a table to compare in", async () => {
    for (const power of [1, 2, 3]) await w.call("PUT", `/api/v1/devices/${id}/resources${light}`, { power });
    const page = await visitor.open(at("history"));
    await page.locator(".plot canvas, .chart canvas, figure canvas, canvas").first().waitFor();
    const picks = page.locator("tbody tr").filter({ has: page.getByRole("cell", { name: t.device.history.kinds["resourceChanged"]!, exact: true }) }).locator("td.pick input");
    await picks.nth(1).waitFor();
    await picks.nth(0).check();
    await picks.nth(1).check();
    await page.getByRole("region", { name: t.device.diff.title }).getByText("power").waitFor();
    expect(visitor.complaints).toEqual([]);
    await page.close();
  });

  test("a hostile value is text", async () => {
    await w.call("PUT", `/api/v1/devices/${id}/resources${light}`, { name: `<img src=x onerror="document.title='run'">` });
    const page = await visitor.open(at("resources"));
    await value(page).getByText("<img src=x").first().waitFor();
    expect(await page.title()).toBe("coaphub");
    expect(visitor.complaints).toEqual([]);
    await page.close();
  });

  test("no part of the page violates WCAG AA, and none is wider than a phone", async () => {
    for (const options of [{ colorScheme: "light" }, { colorScheme: "dark", viewport: { width: 390, height: 800 } }] as const) {
      const v = await w.visitor(options);
      const page = await v.open();
      for (const tab of ["resources", "overview", "commands", "history"]) {
        await page.goto(w.url + at(tab));
        await page.getByRole("tab", { name: t.device.tab.history }).waitFor();
        await page.waitForLoadState("networkidle").catch(() => undefined);
        expect(await violations(page), tab).toEqual([]);
        expect(await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth), tab).toBeLessThanOrEqual(0);
      }
      expect(v.complaints).toEqual([]);
      await v.end();
    }
  });
});

describe("events", () => {
  test("come as they happen; a pause loses none", async () => {
    const page = await visitor.open("/events");
    await page.getByRole("row").nth(3).waitFor({ timeout: 20_000 });
    await page.getByRole("button", { name: t.events.pause }).click();
    const [id] = await w.ids();
    const values = [41, 42, 43];
    for (const power of values) await w.call("PUT", `/api/v1/devices/${id}/resources/light/1`, { power });
    await page.getByRole("button", { name: t.events.resume }).click();
    await page.getByLabel(texts.search).fill(id!);
    for (const power of values) await page.getByRole("cell", { name: new RegExp(`"power":${power}\\b`) }).first().waitFor({ timeout: 10_000 });
    await page.getByRole("button", { name: new RegExp(`^${texts.details}`) }).first().click();
    await page.getByRole("dialog").getByText(/eventMetadata/).waitFor();
    await page.keyboard.press("Escape");
    expect(visitor.complaints).toEqual([]);
    await page.close();
  });
});

describe("the hub goes and comes back", () => {
  test("a banner says so, and the page catches up without being loaded again", async () => {
    const page = await visitor.open();
    await page.getByRole("link", { name: /simulated/ }).first().waitFor();
    await page.evaluate(() => ((window as unknown as { mark: number }).mark = 1));
    await w.stopHub();
    await page.getByText(t.link.lost).waitFor({ timeout: 20_000 });
    await w.startHub();
    await page.getByText(t.link.lost).waitFor({ state: "detached", timeout: 30_000 });
    const more = await w.devices(1, "--seed", "after");
    const n = String((await w.ids()).length);
    await page.getByText(t.devices.of(n, n)).waitFor({ timeout: 20_000 });
    expect(await page.evaluate(() => (window as unknown as { mark?: number }).mark)).toBe(1);
    await more();
    expect(visitor.complaints).toEqual([]);
    await page.close();
  });
});

describe("everybody can use it", () => {
  const pages = ["/", "/add", "/events", ...["certificates", "enrolments", "groups", "tokens", "refusals", "accounts", "audit"].map((tab) => `/security?tab=${tab}`), ...["overview", "rates", "configuration", "links"].map((tab) => `/system?tab=${tab}`)];
  for (const colorScheme of ["light", "dark"] as const)
    test(`no page violates WCAG AA (${colorScheme})`, async () => {
      const v = await w.visitor({ colorScheme });
      const page = await v.open();
      for (const path of pages) {
        await page.goto(w.url + path);
        await page.waitForSelector("main h1");
        await page.waitForLoadState("networkidle").catch(() => undefined);
        expect(await violations(page), path).toEqual([]);
      }
      expect(v.complaints).toEqual([]);
      await v.end();
    });

  test("on a phone nothing is wider than the screen", async () => {
    const v = await w.visitor({ viewport: { width: 390, height: 800 }, hasTouch: true, isMobile: true });
    const page = await v.open();
    for (const path of pages) {
      await page.goto(w.url + path);
      await page.waitForSelector("main h1");
      const { wide, screen } = await page.evaluate(() => ({ wide: document.documentElement.scrollWidth, screen: window.innerWidth }));
      expect(wide, path).toBeLessThanOrEqual(screen);
    }
    await v.end();
  });

  test("the list is reached and sorted by keyboard", async () => {
    const page = await visitor.open();
    await page.getByRole("link", { name: /simulated/ }).first().waitFor();
    await page.keyboard.press("Tab");
    await page.getByRole("link", { name: t.skip }).waitFor();
    await page.getByRole("button", { name: t.devices.sortBy(t.devices.name) }).focus();
    await page.keyboard.press("Enter");
    await page.locator("th[aria-sort=descending]").waitFor();
    await page.close();
  });
});
