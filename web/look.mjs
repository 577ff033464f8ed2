// look.mjs: a picture of each page given
import { chromium } from "playwright-core";
const b = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox"] });
const phone = process.argv.includes("--phone");
const ctx = await b.newContext({ viewport: phone ? { width: 390, height: 800 } : { width: 1280, height: 800 }, colorScheme: process.argv.includes("--dark") ? "dark" : "light" });
const p = await ctx.newPage();
p.on("console", (m) => m.type() !== "log" && m.type() !== "info" && console.log("console:", m.type(), m.text().slice(0, 300)));
p.on("pageerror", (e) => console.log("error:", e.message.slice(0, 500)));
const base = "http://127.0.0.1:48080";
await p.goto(base + "/");
await p.waitForSelector("input[name=password], input[type=password]");
const name = (await p.$("input[name=username]")) ?? (await p.$("input[type=text]"));
await name.fill("admin");
await p.fill("input[type=password]", "correct-horse-battery");
const t0 = Date.now();
await p.click("button[type=submit]");
await p.waitForSelector("h1");
console.log("signed in", Date.now() - t0, "ms", p.url());
let i = 0;
for (const at of process.argv.slice(2).filter((a) => a.startsWith("/") )) {
  await p.goto(base + at);
  await p.waitForTimeout(1500);
  await p.screenshot({ path: `/tmp/con/p${i++}.png` });
}
await b.close();
