import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { defineConfig, type Plugin } from "vite";

const here = fileURLToPath(new URL(".", import.meta.url));
const pages = readdirSync(here).filter((name) => name.endsWith(".html"));

const PACKED = /\.(html|js|css|svg|txt)$/;

/** Beside each file that shrinks the same in gzip: the server sends what is there. */
function gzipped(): Plugin {
  return {
    name: "gzipped",
    writeBundle(options, bundle) {
      for (const name of Object.keys(bundle).filter((each) => PACKED.test(each))) {
        const path = `${options.dir}/${name}`;
        const packed = gzipSync(readFileSync(path), { level: 9 });
        // the same bytes on every machine
        packed[9] = 255;
        writeFileSync(`${path}.gz`, packed);
      }
    },
  };
}

/** What others ask to be told of their code that is in the bundle. */
function licences(packages: string[]): Plugin {
  return {
    name: "licences",
    generateBundle() {
      const texts = packages.map((name) => {
        const folder = `${here}node_modules/${name}`;
        const file = readdirSync(folder).find((each) => /^licen[cs]e/i.test(each));
        if (!file) throw new Error(`${name} has no licence file`);
        return `== ${name}\n\n${readFileSync(`${folder}/${file}`, "utf8").trim()}\n`;
      });
      this.emitFile({ type: "asset", fileName: "assets/licences.txt", source: texts.join("\n") });
    },
  };
}

export default defineConfig({
  root: here,
  // the server answers by these names; nothing else is looked up outside of assets/
  base: "/",
  publicDir: "public",
  plugins: [licences(["dompurify", "highlight.js", "marked"]), gzipped()],
  build: {
    outDir: "../chatserve/web/static",
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    rollupOptions: { input: pages.map((name) => `${here}${name}`) },
  },
  server: {
    // `npx vite` beside a server: CHATSERVE_URL=http://127.0.0.1:8000
    proxy: Object.fromEntries(
      ["/v1", "/health", "/page", "/admin", "/tokenize"].map((path) => [
        path,
        { target: process.env.CHATSERVE_URL ?? "http://127.0.0.1:8000", changeOrigin: true },
      ]),
    ),
  },
});
