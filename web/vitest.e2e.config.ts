import { defineConfig } from "vitest/config";

// The console in a browser, against a real hub: test/console starts it, since it has the hub's program. One at a time: they
// share two cores with a browser.
export default defineConfig({
  test: { include: ["e2e/**/*.test.ts"], fileParallelism: false, testTimeout: 120_000, hookTimeout: 120_000, reporters: ["default"] },
});
