import react from "@vitejs/plugin-react";
import { readFileSync } from "node:fs";
import { defineConfig, type Plugin } from "vite";
import { catalogue } from "./catalogue";

// In development `npm run dev` serves the pages itself and hands everything else to a hub, by default the one of `make run`.
const hub = process.env["COAPHUB"] ?? "http://127.0.0.1:8080";

/** The error catalogue as a page, so that a code on a page of the console leads to what it means, also where there is no internet. */
function errors(): Plugin {
  return {
    name: "errors",
    generateBundle() {
      const text = readFileSync(new URL("../docs/errors.md", import.meta.url), "utf8");
      this.emitFile({ type: "asset", fileName: "console/errors.html", source: catalogue(text) });
    },
  };
}

export default defineConfig({
  plugins: [react(), errors()],
  resolve: {
    alias: {
      "@coaphub/client": new URL("../api/typescript/src/index.ts", import.meta.url).pathname,
      "openapi-fetch": new URL("node_modules/openapi-fetch", import.meta.url).pathname,
    },
  },
  build: { target: "es2022", assetsDir: "console", assetsInlineLimit: 0, modulePreload: { polyfill: false }, reportCompressedSize: false, chunkSizeWarningLimit: 600 },
  server: {
    host: "127.0.0.1",
    proxy: Object.fromEntries(["/api", "/oauth", "/.well-known", "/certificate-authority", "/device-provisioning-service"].map((at) => [at, { target: hub, ws: true }])),
  },
  test: { include: ["src/**/*.test.ts", "src/**/*.test.tsx"] },
} as Parameters<typeof defineConfig>[0]);
