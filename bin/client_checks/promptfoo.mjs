import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const home = mkdtempSync(join(tmpdir(), "promptfoo-"));
const config = { apiBaseUrl: process.env.OPENAI_BASE_URL, apiKey: "none", max_tokens: 16, max_output_tokens: 16 };
const asked = {
  prompts: ["Reverse: {{word}}"],
  providers: ["chat", "responses"].map((kind) => ({ id: `openai:${kind}:${process.env.MODEL}`, config })),
  tests: [{ vars: { word: "lamu" }, assert: [{ type: "equals", value: "umal" }] }],
};
const quiet = { PROMPTFOO_CONFIG_DIR: home, PROMPTFOO_DISABLE_TELEMETRY: "1", PROMPTFOO_DISABLE_UPDATE: "1" };
writeFileSync(join(home, "config.json"), JSON.stringify(asked));
try {
  const words = ["eval", "--no-cache", "-c", join(home, "config.json"), "-o", join(home, "report.json")];
  const program = join(process.env.NODE_PATH, "promptfoo", "dist", "src", "entrypoint.js");
  execFileSync(process.execPath, [program, ...words], { env: { ...process.env, ...quiet }, stdio: ["ignore", 2, 2] });
  const { results } = JSON.parse(readFileSync(join(home, "report.json"))).results;
  for (const one of results) console.log(one.response.output);
} finally {
  rmSync(home, { recursive: true });
}
