/** Pictures of each page for docs/console.md: `make screenshots`. */
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { texts } from "../src/texts";
import { World } from "./world";

const folder = process.env["COAPHUB_SCREENSHOTS"] ?? "";

test("screenshots", { timeout: 240_000 }, async () => {
  expect(folder, "COAPHUB_SCREENSHOTS is a folder").not.toBe("");
  mkdirSync(folder, { recursive: true });
  const w = new World();
  await w.start();
  try {
    await w.devices(24, "--rate", "6", "--seed", "screenshots");
    const [id] = await w.ids();
    const stop = await w.devices(6, "--seed", "offline");
    await stop();
    const light = encodeURIComponent("/light/1");
    for (let power = 0; power < 60; power++) await w.call("PUT", `/api/v1/devices/${id}/resources/light/1`, { power: Math.round(50 + 45 * Math.sin(power / 5)) });
    const v = await w.visitor();
    const page = await v.open();
    const shoot = async (name: string) => {
      await page.waitForLoadState("networkidle").catch(() => undefined);
      await page.screenshot({ path: join(folder, `${name}.png`) });
    };
    await page.getByRole("link", { name: /simulated/ }).nth(5).waitFor();
    await shoot("devices");
    for (const tab of ["resources", "overview", "history"]) {
      await page.goto(`${w.url}/devices/${id}?tab=${tab}&href=${light}`);
      await page.getByRole("tab", { name: texts.device.tab.history }).waitFor();
      await shoot(`device-${tab}`);
    }
    await page.goto(`${w.url}/add`);
    await page.getByRole("button", { name: texts.add.make, exact: true }).click();
    await page.getByRole("img", { name: texts.add.qr }).waitFor();
    await shoot("add");
    await page.goto(`${w.url}/events`);
    await page.getByRole("row").nth(12).waitFor();
    await shoot("events");
    await page.goto(`${w.url}/security`);
    await page.getByRole("row").nth(3).waitFor();
    await shoot("security");
    await page.goto(`${w.url}/system?tab=rates`);
    await page.locator("figure canvas").nth(5).waitFor();
    await page.waitForTimeout(20_000); // the charts show time that passes
    await shoot("system");
    await page.emulateMedia({ colorScheme: "dark" });
    await page.setViewportSize({ width: 390, height: 800 });
    await page.goto(w.url);
    await page.getByRole("link", { name: /simulated/ }).nth(5).waitFor();
    await shoot("phone");
    await v.end();
  } finally {
    await w.end();
  }
});
