// The page's loop without a page: samples with onnxruntime-node, and prints what came out as JSON.
//
//     node examples/web/node.js OUT PACKAGES
//
// OUT is what make.py wrote, PACKAGES a folder in which `npm install` had package.json's devDependencies, too.

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";

import { Denoiser, compare, sample } from "./sampling.js";

const [out, packages] = process.argv.slice(2).map((folder) => path.resolve(folder));
const ort = createRequire(path.join(packages, "package.json"))("onnxruntime-node");

const table = JSON.parse(await readFile(path.join(out, "table.json"), "utf8"));
const found = {};
for (const kind of ["dense", "lazy"]) {
  const session = await ort.InferenceSession.create(path.join(out, table.files[kind]));
  const run = await sample(new Denoiser(session, ort.Tensor), ort.Tensor, table, table.noise);
  found[kind] = { ...run, images: Array.from(run.images) };
}
console.log(JSON.stringify({ ...found, ...compare(found.dense.images, found.lazy.images) }));
