// The page: loads both files, samples with each, and draws what comes out while it does.

import * as ort from "./ort/ort.wasm.bundle.min.mjs";

import { Denoiser, compare, drawNoise, sample } from "./sampling.js";

// More threads share memory, which browsers allow only to pages that a server isolates from others.
ort.env.wasm.numThreads = 1;

const element = (id) => document.getElementById(id);

/** One of the two cards: a strip of cells, one for each step, and a canvas for each image. */
class Card {
  #root;
  #cells;
  #canvases;

  constructor(id, table) {
    this.#root = element(id);
    this.#cells = table.timesteps.map(() => {
      const cell = document.createElement("i");
      cell.className = "cell";
      return cell;
    });
    const [, , height, width] = table.shape;
    this.#canvases = table.labels.map((label) => {
      const canvas = document.createElement("canvas");
      Object.assign(canvas, { width, height, title: `asked for: ${label}` });
      return canvas;
    });
    this.#root.querySelector(".strip").replaceChildren(...this.#cells);
    this.#root.querySelector(".digits").replaceChildren(...this.#canvases);
  }

  clear() {
    for (const cell of this.#cells) cell.className = "cell";
    this.#root.querySelector(".time").textContent = "";
  }

  step(step, computed, latents) {
    this.#cells[step].className = computed ? "cell computed" : "cell skipped";
    this.draw(latents);
  }

  draw(images) {
    const size = images.length / this.#canvases.length;
    this.#canvases.forEach((canvas, k) => {
      const picture = new ImageData(canvas.width, canvas.height);
      for (let pixel = 0; pixel < size; pixel++) {
        const grey = 127.5 * (images[k * size + pixel] + 1); // the clamped array of a picture rounds and clips
        picture.data.set([grey, grey, grey, 255], 4 * pixel);
      }
      canvas.getContext("2d").putImageData(picture, 0, 0);
    });
  }

  time(milliseconds) {
    this.#root.querySelector(".time").textContent = `${milliseconds.toFixed(0)} ms`;
  }
}

async function load() {
  const table = await (await fetch("table.json")).json();
  const [dense, lazy] = await Promise.all(
    ["dense", "lazy"].map(async (kind) => {
      const session = await ort.InferenceSession.create(table.files[kind], { executionProviders: ["wasm"] });
      const denoiser = new Denoiser(session, ort.Tensor);
      // A browser compiles WebAssembly again, and better, once it has run for a while: whoever is timed first would be slow.
      await sample(denoiser, ort.Tensor, table, table.noise);
      return { denoiser, card: new Card(kind, table) };
    }),
  );
  return { table, sides: { dense, lazy } };
}

/** Sample with both files from the same noise. */
async function run({ table, sides }, noise) {
  for (const { card } of Object.values(sides)) {
    card.clear();
    card.draw(noise);
  }
  const found = {};
  for (const [kind, { denoiser, card }] of Object.entries(sides)) {
    element("status").value = `Drawing, ${kind} …`;
    found[kind] = await sample(denoiser, ort.Tensor, table, noise, async (...now) => {
      card.step(...now);
      // A page in the background is given no frames.
      if (!document.hidden) await new Promise(requestAnimationFrame);
    });
    card.time(found[kind].milliseconds);
  }
  return { ...found, ...compare(found.dense.images, found.lazy.images) };
}

function show({ dense, lazy, psnr, largest }) {
  const computed = lazy.computes.filter(Boolean).length;
  element("status").value = "";
  element("speedup").textContent = `${(dense.milliseconds / lazy.milliseconds).toFixed(2)} ×`;
  element("computed").textContent = `${computed} of ${lazy.computes.length}`;
  element("psnr").textContent = `${psnr.toFixed(1)} dB`;
  element("largest").textContent = `${((100 * largest) / 2).toFixed(1)} %`;
}

async function main() {
  const loaded = await load();
  let noise = Float32Array.from(loaded.table.noise);
  const buttons = [element("again"), element("noise")];
  const go = async () => {
    for (const button of buttons) button.disabled = true;
    const found = await run(loaded, noise);
    show(found);
    for (const button of buttons) button.disabled = false;
    return found;
  };
  element("again").onclick = go;
  element("noise").onclick = () => {
    noise = drawNoise(noise.length);
    return go();
  };
  return go();
}

/** What the first run gave, from the noise in table.json: for who drives the page. */
window.results = main().catch((error) => {
  element("status").value = `This did not work: ${error.message}`;
  throw error;
});
