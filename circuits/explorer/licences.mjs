// Writes the licences of what is in d3.js, with versions.
import { readFileSync, readdirSync, writeFileSync } from "node:fs";

const parts = readdirSync("node_modules").filter((name) => name.startsWith("d3-")).map((name) => {
  const { version, license, repository } = JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf8"));
  const text = readFileSync(`node_modules/${name}/LICENSE`, "utf8").trim();
  return `${name} ${version} (${license}), ${repository.url.replace(/^git\+/, "").replace(/\.git$/, "")}\n\n${text}\n`;
});
writeFileSync("d3.licences.txt", parts.join(`\n${"-".repeat(80)}\n\n`));
