import { defineConfig } from "vitest/config";

// apart from the build: no plugin of it is needed here
export default defineConfig({
  test: {
    include: ["test/**/*.test.ts"],
    environment: "jsdom",
    isolate: false,
    testTimeout: 60_000,
  },
});
